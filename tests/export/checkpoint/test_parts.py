"""Checkpoints of networks that are folded in parts: written, read, damaged, and made to attack whoever reads them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, treespec_dumps

from bnre_exp import UserError, calibrate, fold_batch_norms, load_folded, quantize, save_folded
from bnre_exp.quantsim.whole import parts_of
from tests.detectors import PARTS, Detector, block, detector, equal, folded_detector, images
from tests.networks import Net, randomize


@pytest.fixture(scope="module")
def folded():
    return folded_detector(detector(), weight_bits=4)


@pytest.fixture(scope="module")
def saved(folded, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net"
    save_folded(folded, path)
    return path


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")


def refused(checkpoint: Path, match: str, model: nn.Module | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_folded(checkpoint, model=model or Detector())
    message = str(caught.value)
    assert "Traceback" not in message and "\n" not in message and str(checkpoint) in message and ".." not in message


def edit(checkpoint: Path, change: Any) -> None:
    """Change parts.json, as someone would who can compute a SHA-256 as well."""
    index = json.loads((checkpoint / "parts.json").read_text())
    change(index)
    if (checkpoint / "rest.safetensors").is_file():
        index["rest_sha256"] = hashlib.sha256((checkpoint / "rest.safetensors").read_bytes()).hexdigest()
    (checkpoint / "parts.json").write_text(json.dumps(index))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(folded, saved, wrap):
    model = detector(7).train()
    before = copy.deepcopy(model.state_dict())
    loaded = load_folded(saved, model=wrap(model))
    assert type(loaded) is Detector and list(parts_of(loaded)) == PARTS
    expected, found = folded.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys() and equal([found[name] for name in expected], [*expected.values()])
    assert not any(module.training for module in loaded.modules()) and loaded.backbone.width == 8
    for x in images():
        assert equal(loaded(x), folded(x))
    assert equal(model.state_dict(), before) and model.training
    graph = load_folded(saved / "backbone")
    assert equal(graph(images()[0]), parts_of(folded)["backbone"](images()[0]))


def test_a_loaded_network_is_saved_again_in_the_same_bytes(saved, tmp_path):
    save_folded(load_folded(saved, model=Detector()), tmp_path / "again")
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_parts_of_the_users_own_code_are_named_and_come_from_the_model(tmp_path):
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(3)

    def network() -> nn.Module:
        return Net(lambda m, x: m.deep["x"](x), deep=nn.ModuleDict({"x": nn.Sequential(block(3, 4), Own())}))

    model = randomize(network()).eval()
    sim = quantize(model, images()[0], leaf_modules=["Own"], submodules=["deep.x"])
    calibrate(sim, images(), num_batches=4)
    folded, _ = fold_batch_norms(sim)
    (lacking,) = save_folded(folded, tmp_path / "net")
    assert lacking.startswith("deep.x.1 (") and lacking.endswith("Own)")
    assert (tmp_path / "net" / "deep.x" / "network.json").is_file()
    assert equal(load_folded(tmp_path / "net", model=network())(images()[1]), folded(images()[1]))


def test_it_is_loaded_only_with_the_network_that_was_quantized(saved):
    with pytest.raises(UserError, match=r"is that of parts of a network; load_folded\(path, model=...\) needs"):
        load_folded(saved)
    refused(saved, "the network has no 'backbone', 'head'", block(3, 8))
    other = Detector()
    other.normalize = nn.BatchNorm2d(4)
    refused(saved, "the network's normalize.bias, normalize.running_mean.* is another", other)
    other = Detector()
    other.normalize = nn.Sequential(nn.BatchNorm2d(3))
    refused(saved, "the network's normalize.0.bias, .* and others is another", other)
    refused(saved, "the network's .*normalize.* is another", Detector().double())


def not_utf8(path: Path) -> None:
    (path / "parts.json").write_bytes(b"\xff\xfe{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "parts.json").write_text("{"), "cannot be loaded: Expecting"),
        (lambda path: (path / "parts.json").write_text(""), "cannot be loaded: Expecting"),
        (lambda path: (path / "parts.json").write_text("[" * 100_000), "cannot be loaded"),
        (lambda path: (path / "parts.json").write_text("[]"), "its format is not 'bnre_exp.folded_parts'"),
        (lambda path: (path / "parts.json").write_text("null"), "its format is not 'bnre_exp.folded_parts'"),
        (not_utf8, "cannot be loaded"),
        (lambda path: (path / "rest.safetensors").unlink(), "No such file"),
        (lambda path: (path / "rest.safetensors").write_bytes(b"abc"), "its SHA-256 differs"),
        (lambda path: shutil.rmtree(path / "head"), "head/network.json cannot be read"),
        (lambda path: (path / "head" / "weights.safetensors").write_bytes(b""), "weights.safetensors is not the file"),
        (lambda path: (path / "head").rename(path / "other"), "head/network.json cannot be read"),
    ],
)
def test_damaged_files_are_told(checkpoint, damage, message):
    damage(checkpoint)
    refused(checkpoint, message)


def test_every_bit_of_the_rest_is_checked(checkpoint):
    content = bytearray((checkpoint / "rest.safetensors").read_bytes())
    content[-3] ^= 1
    (checkpoint / "rest.safetensors").write_bytes(content)
    refused(checkpoint, "rest.safetensors is not the file that parts.json was written with")


def other_structure(value: Any) -> str:
    return treespec_dumps(tree_flatten(value)[1])


NAMED = namedtuple("NAMED", "a")
DEEP = '{"type": "builtins.list", "context": "null", "children_spec": [' * 5000


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("version"),
        lambda index: index.update(version=99),
        lambda index: index.update(version="1"),
        lambda index: index.update(format="bnre_exp.folded"),
        lambda index: index.pop("parts"),
        lambda index: index.update(parts={}),
        lambda index: index.update(parts=["backbone"]),
        lambda index: index["parts"].update(backbone=None),
        lambda index: index["parts"].update(backbone=["structure"]),
        lambda index: index["parts"]["head"].pop("structure"),
        lambda index: index["parts"]["head"].update(structure=7),
        lambda index: index["parts"]["head"].update(structure=["a"]),
        lambda index: index["parts"]["head"].update(structure="[1, {}]"),
        lambda index: index["parts"]["head"].update(structure="[1, null]"),
        lambda index: index["parts"]["head"].update(structure=other_structure([1, 2])),
        lambda index: index["parts"]["head"].update(structure=other_structure(([1], [2]))),
        lambda index: index["parts"]["head"].update(structure=other_structure((({1: 2},), defaultdict(list)))),
        lambda index: index["parts"]["head"].update(structure=f"[1, {DEEP}"),
        lambda index: index["parts"]["head"].update(structure=f"[1, {DEEP + ']}' * 5000}]"),
        lambda index: index["parts"]["head"].update(constants=None),
        lambda index: index["parts"]["head"].update(constants=[[7, 1.0]]),
        lambda index: index["parts"]["head"].update(constants=[[-1, 1.0]]),
        lambda index: index["parts"]["head"].update(constants=[["2", 1.0]]),
        lambda index: index["parts"]["head"].update(constants=[[0, 1], [1, 1], [2, 1]]),
        lambda index: index["parts"]["head"].update(constants=[[2, [1.0]]]),
        lambda index: index["parts"]["head"].update(gives="Popen"),
        lambda index: index["parts"]["head"].update(gives="os"),
        lambda index: index["parts"]["head"].update(gives=["dict"]),
        lambda index: index["parts"].update({"": index["parts"].pop("head")}),
        lambda index: index["parts"].update({"head.tower": index["parts"]["head"]}),
        lambda index: index["parts"].update({"normalize.weight": index["parts"]["head"]}),
        lambda index: index["parts"].pop("head"),
    ],
)
def test_a_hostile_or_damaged_index_is_refused(checkpoint, change):
    edit(checkpoint, change)
    with pytest.raises(UserError, match="cannot be (loaded|read)"):
        load_folded(checkpoint, model=Detector())


HOSTILE = {"fqn": "canary:C", "name": "A", "__enum__": True}


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.defaultdict",
         {"default_factory_module": "canary", "default_factory_name": "f", "dict_context": []}),
        ("builtins.dict", json.dumps([HOSTILE])),
        ("builtins.tuple", json.dumps(HOSTILE)),
        ("collections.deque", json.dumps(HOSTILE)),
    ],
)  # fmt: skip
def test_a_structure_imports_nothing(checkpoint, kind, context, tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("open('sings', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    leaf = {"type": None, "context": None, "children_spec": []}
    inner = {"type": kind, "context": context, "children_spec": [leaf]}
    args = {"type": "builtins.tuple", "context": "null", "children_spec": [inner]}
    kwargs = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    call = {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}
    edit(checkpoint, lambda index: index["parts"]["head"].update(structure=json.dumps([1, call]), constants=[]))
    refused(checkpoint, "cannot be loaded: ")
    assert not (tmp_path / "sings").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "head/../../elsewhere", "{absolute}", "."])
def test_nothing_outside_of_the_folder_is_read(checkpoint, saved, tmp_path, name):
    shutil.copytree(saved / "head", tmp_path / "elsewhere")
    name = name.replace("{absolute}", str(tmp_path / "elsewhere"))
    edit(checkpoint, lambda index: index["parts"].update({name: index["parts"].pop("head")}))
    with pytest.raises(UserError, match="cannot be loaded: submodules: the network has no"):
        load_folded(checkpoint, model=Detector())


@pytest.mark.parametrize(
    "change",
    [
        lambda rest: rest.pop("normalize.weight"),
        lambda rest: rest.update({"normalize.weight": torch.ones(4)}),
        lambda rest: rest.update({"normalize.weight": torch.ones(3).double()}),
        lambda rest: rest.update({"more": torch.ones(3)}),
        lambda rest: rest.update({"head.network.box.bias": torch.ones(4)}),
        lambda rest: rest.clear(),
    ],
)
def test_a_rest_that_does_not_fit_is_refused(checkpoint, change):
    rest = load_file(checkpoint / "rest.safetensors")
    change(rest)
    save_file(rest, checkpoint / "rest.safetensors")
    edit(checkpoint, lambda index: None)
    refused(checkpoint, "cannot be loaded: the network's .* is another")


# Where it is written


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_replaced_by_another(folded, saved, checkpoint):
    other = folded_detector(detector(3))
    save_folded(other, checkpoint)
    assert snapshot(checkpoint).keys() == snapshot(saved).keys() and snapshot(checkpoint) != snapshot(saved)
    assert equal(load_folded(checkpoint, model=Detector())(images()[0]), other(images()[0]))
    empty = checkpoint.parent / "empty"
    empty.mkdir()
    save_folded(folded, empty)
    assert snapshot(empty) == snapshot(saved) and {path.name for path in checkpoint.parent.iterdir()} == {
        "net",
        "empty",
    }


def another_file(path: Path) -> None:
    (path / "thesis.txt").write_text("years of work")


def another_file_in_a_part(path: Path) -> None:
    (path / "head" / "thesis.txt").write_text("years of work")


def another_folder(path: Path) -> None:
    shutil.copytree(path / "head", path / "third")


def another_index(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "parts.json").write_text('{"parts": {"screws": 5}}')


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("years of work")


def hostile_names(path: Path) -> None:
    (path.parent / "thesis.txt").write_text("years of work")
    edit(path, lambda index: index["parts"].update({"..": index["parts"]["head"]}))


@pytest.mark.parametrize(
    "change", [another_file, another_file_in_a_part, another_folder, another_index, a_file, hostile_names]
)
def test_other_files_are_not_deleted(folded, checkpoint, change):
    change(checkpoint)
    before = snapshot(checkpoint.parent)
    with pytest.raises(UserError, match=r"another (folder|path)"):
        save_folded(folded, checkpoint)
    assert snapshot(checkpoint.parent) == before


def test_a_checkpoint_of_a_whole_network_is_no_part_of_one(folded, saved, tmp_path):
    shutil.copytree(saved / "head", tmp_path / "net")
    save_folded(folded, tmp_path / "net")
    with pytest.raises(UserError, match="other files than a checkpoint"):
        save_folded(parts_of(folded)["head"], tmp_path / "net")


def extra_state(folded: Any) -> None:
    folded.normalize.__class__ = type("Counting", (nn.BatchNorm2d,), {"get_extra_state": lambda self: {"count": 1}})


def sparse(folded: Any) -> None:
    folded.register_buffer("table", torch.eye(3).to_sparse())


def bypass(folded: Any) -> None:
    next(m for m in folded.head.modules() if hasattr(m, "bypassed")).bypassed = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (extra_state, "the state outside of its parts is no dense tensors"),
        (sparse, "the state outside of its parts is no dense tensors"),
        (bypass, "is bypassed or being calibrated"),
    ],
)
def test_what_cannot_be_stored_leaves_what_was_there(folded, checkpoint, change, message):
    before, folded = snapshot(checkpoint), copy.deepcopy(folded)
    change(folded)
    with pytest.raises(UserError, match=f"The network cannot be saved: .*{message}"):
        save_folded(folded, checkpoint)
    assert snapshot(checkpoint) == before and len(list(checkpoint.parent.iterdir())) == 1


@pytest.mark.parametrize("argument", ["device", "named", "folder"])
def test_a_part_whose_call_or_name_cannot_be_stored_is_refused(argument, tmp_path):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Any, *_: Any) -> Tensor:
            return self.conv(x.a if argument == "named" else x)

    given = {"device": lambda x: (x, x.device), "named": lambda x: (NAMED(x),), "folder": lambda x: (x,)}[argument]
    name = "a/b" if argument == "folder" else "a"
    heads = nn.ModuleDict({name: Head()})
    model = Net(lambda m, x: m.heads[name](*given(x)), heads=heads).eval()
    sim = quantize(model, images()[0], submodules=[f"heads.{name}"])
    calibrate(sim, images(), num_batches=4)
    folded, _ = fold_batch_norms(sim)
    message = {
        "device": "something else than tensors and",
        "named": "called with other containers",
        "folder": "rename its",
    }
    with pytest.raises(UserError, match=f"The network cannot be saved: .*{message[argument]}"):
        save_folded(folded, tmp_path / "net")
    assert not os.listdir(tmp_path)
