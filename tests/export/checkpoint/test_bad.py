"""A checkpoint that is damaged, foreign or hostile gives one message, and runs nothing."""

from __future__ import annotations

import re
import shutil
import traceback

import pytest
import torch
from safetensors.torch import load_file, save_file

from bnre_exp import UserError
from bnre_exp.export.checkpoint.save_load import load_folded
from tests.export.saving import IMAGES, edit, refused


@pytest.mark.parametrize("name", ["network.json", "weights.safetensors"])
def test_missing_files(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, f"{name} cannot be read.*save_folded")


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "cannot be read")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"format": "bnre_exp.folded", "ver', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not written by save_folded"),
        ('{"format": "onnx"}', "not written by save_folded"),
        ('{"format": "bnre_exp.folded", "version": 99}', "version 99; this bnre_exp reads up to 3"),
    ],
)
def test_broken_or_foreign_json(checkpoint, text, match):
    (checkpoint / "network.json").write_text(text)
    refused(checkpoint, match)


def test_weights_of_another_checkpoint_or_cut_short(checkpoint):
    weights = (checkpoint / "weights.safetensors").read_bytes()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    for content in (weights[: len(weights) // 2], b"", flipped):
        (checkpoint / "weights.safetensors").write_bytes(content)
        refused(checkpoint, "SHA-256 differs")
        if content is not flipped:
            edit(checkpoint, lambda document: None)
            refused(checkpoint, "not a whole safetensors file")


def retensor(checkpoint, change):
    tensors = load_file(checkpoint / "weights.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, checkpoint / "weights.safetensors")
    edit(checkpoint, lambda document: None)


CODES, SCALE = "0.parametrizations.weight.original", "0.parametrizations.weight.0.scale"


def test_missing_unexpected_and_changed_tensors(checkpoint, saved):
    changes = {
        f"missing or unexpected tensors: {CODES}": lambda t: t.pop(CODES),
        "missing or unexpected tensors: more": lambda t: t.update(more=torch.ones(1)),
        f"{SCALE}' is torch.float32 \\(3,\\), expected float32 \\(8,\\)": lambda t: t.update({SCALE: torch.ones(3)}),
        f"{CODES}' is torch.int16": lambda t: t.update({CODES: t[CODES].short()}),
    }
    for match, change in changes.items():
        retensor(checkpoint, change)
        refused(checkpoint, match)
        shutil.copy(saved / "weights.safetensors", checkpoint)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (SCALE, torch.ones(3)),
        (CODES, torch.zeros(8, 3, 5, 5, dtype=torch.int8)),
        (CODES, torch.zeros(8, 3, 3, 3)),
        ("act_quantizers.input_1.scale", torch.ones(2)),
    ],
)
def test_tensors_that_do_not_fit_their_module(checkpoint, name, tensor):
    retensor(checkpoint, lambda tensors: tensors.update({name: tensor}))
    layout = {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)}
    edit(checkpoint, lambda document: document["tensors"].update({name: layout}))
    refused(checkpoint, re.escape(name.split(".parametrizations")[0].removesuffix(".scale")))


@pytest.mark.parametrize("stride", [[0, 0, 0, 0], [2**40, 9, 3, 1], [-27, 9, 3, 1], [27, 9, 3], [1, 9, 3, 1]])
def test_strides_outside_the_tensor(checkpoint, stride):
    edit(checkpoint, lambda document: document["tensors"][CODES].update(stride=stride))
    refused(checkpoint, "cannot have the strides")


def test_an_untouched_copy_loads(checkpoint):
    try:
        edit(checkpoint, lambda document: None)
        load_folded(checkpoint)(IMAGES)
    except UserError:
        pytest.fail(traceback.format_exc())
