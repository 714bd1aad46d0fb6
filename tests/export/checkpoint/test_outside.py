"""A network with code of the user's own: not needed where torch, torchvision and ours suffice, else named."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bnre_exp
from bnre_exp import UserError
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
from tests.export.saving import IMAGES, assert_same, edit, folded_network, refused
from tests.networks import flat_cnn, randomize

USER_CODE = """
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

class Pair(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor = None

class Holder:
    @dataclass
    class Record:
        logits: torch.Tensor
        more: object

def pair(y, x):
    return Pair(y, features=x)

def nested(y, x):
    return {"pairs": [Pair(y, x), Pair(Pair(x, y))], "y": y}

def record(y, x):
    return {"record": Holder.Record(y, Pair(x, y)), "y": y}

def local_record(y, x):
    @dataclass
    class Local:
        logits: torch.Tensor
    return {"record": Local(x), "y": y}

@fx.wrap
def twice(x):
    return 2 * x if float(x.sum()) != 1e9 else x

class Gate(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))
        self.register_buffer("shift", torch.randn(channels), persistent=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.bn(x * self.weight[:, None, None] + self.shift[:, None, None])

class UserNet(nn.Module):
    def __init__(self, gated=False, doubled=False, answer=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.gate = Gate() if gated else nn.ReLU()
        self.doubled, self.answer = doubled, answer
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.gate(self.bn(self.conv(x)))
        x = twice(x) if self.doubled else x
        y = self.head(x.mean((2, 3)))
        return self.answer(y, x) if self.answer else y
"""

LOADER = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file
from bnre_exp.export.checkpoint.save_load import load_folded
assert importlib.util.find_spec("user_code") is None

def forbid(event, args):
    if event == "pickle.find_class":
        raise SystemExit(f"pickle was used: {args}")

sys.addaudithook(forbid)
data = load_file(sys.argv[3])
with torch.no_grad():
    same = torch.equal(load_folded(sys.argv[2])(data["x"]), data["y"])
print("same" if same else "different")
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "user_code.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path / "user")
    yield importlib.import_module("user_code")
    del sys.modules["user_code"]


@pytest.mark.slow
def test_new_process_without_the_users_code(tmp_path, user_code):
    folded = folded_network(randomize(user_code.UserNet()), IMAGES, weight_bits=4)
    assert save_folded(folded, tmp_path / "net") == ()
    save_file({"x": IMAGES, "y": folded(IMAGES).detach()}, tmp_path / "data.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    root = str(Path(bnre_exp.__file__).parents[1])
    command = [sys.executable, "-I", "-c", LOADER, root, str(tmp_path / "net"), str(tmp_path / "data.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_users_leaf_is_named_and_required(tmp_path, user_code, caplog):
    model = randomize(user_code.UserNet(gated=True))
    folded = folded_network(model, IMAGES, leaf_modules=["Gate"])
    with caplog.at_level(logging.WARNING):
        assert save_folded(folded, tmp_path / "net") == ("gate (user_code.Gate)",)
    assert "gate (user_code.Gate)" in caplog.text
    with pytest.raises(UserError, match=r"gate \(user_code.Gate\).*model="):
        load_folded(tmp_path / "net")
    other = user_code.UserNet(gated=True).double()  # other values everywhere
    assert_same(folded, load_folded(tmp_path / "net", model=other), IMAGES)
    assert other.gate.weight.dtype == torch.float64
    with pytest.raises(UserError, match="'gate' of model= is a torch.nn.modules.activation.ReLU, expected"):
        load_folded(tmp_path / "net", model=user_code.UserNet())
    with pytest.raises(UserError, match="no module 'gate'"):
        load_folded(tmp_path / "net", model=flat_cnn())
    other.gate = user_code.Gate(4)
    with pytest.raises(UserError, match="gate.* has the shape"):
        load_folded(tmp_path / "net", model=other)


def test_users_function_is_named_and_required(tmp_path, user_code):
    folded = folded_network(randomize(user_code.UserNet(doubled=True)), IMAGES)
    assert save_folded(folded, tmp_path / "net") == ("user_code.twice (function)",)
    with pytest.raises(UserError, match=r"user_code.twice \(function\).*model="):
        load_folded(tmp_path / "net")
    assert_same(folded, load_folded(tmp_path / "net", model=user_code.UserNet()), IMAGES)
    with pytest.raises(UserError, match="user_code.twice is not marked"):
        load_folded(tmp_path / "net", model=flat_cnn())


@pytest.mark.parametrize("answer", ["pair", "nested"])
def test_named_tuples_need_no_model_and_with_one_are_of_the_users_class(tmp_path, user_code, answer):
    model = randomize(user_code.UserNet(answer=getattr(user_code, answer)))
    folded = folded_network(model, IMAGES)
    assert save_folded(folded, tmp_path / "net") == ()
    loaded, expected = load_folded(tmp_path / "net"), folded(IMAGES)
    output = loaded(IMAGES)
    first, wanted = (value if answer == "pair" else value["pairs"][1] for value in (output, expected))
    assert (
        type(first).__name__ == "Pair" and first._fields == ("logits", "features") and type(first) is not type(wanted)
    )
    inner = [value.logits if answer == "pair" else value.logits.features for value in (first, wanted)]
    assert torch.equal(*inner)
    again = load_folded(tmp_path / "net", model=user_code.UserNet())
    assert_same(folded, again, IMAGES)
    assert type(again(IMAGES) if answer == "pair" else again(IMAGES)["pairs"][1]) is user_code.Pair
    save_folded(loaded, tmp_path / "again")
    for name in ("network.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_a_dataclass_in_the_outputs_needs_the_model(tmp_path, user_code):
    folded = folded_network(randomize(user_code.UserNet(answer=user_code.record)), IMAGES)
    assert save_folded(folded, tmp_path / "net") == ("user_code.Holder.Record (function)",)
    with pytest.raises(UserError, match=r"user_code.Holder.Record .*model="):
        load_folded(tmp_path / "net")
    output = load_folded(tmp_path / "net", model=user_code.UserNet())(IMAGES)
    assert type(output["record"]) is user_code.Holder.Record and type(output["record"].more) is user_code.Pair
    assert torch.equal(output["record"].logits, folded(IMAGES)["record"].logits)
    with pytest.raises(UserError, match=r"user_code.Holder.Record is not"):
        load_folded(tmp_path / "net", model=flat_cnn())


def test_what_could_not_be_loaded_is_not_saved(tmp_path, user_code):
    local = folded_network(randomize(user_code.UserNet(answer=user_code.local_record)), IMAGES)
    unmarked = folded_network(flat_cnn(), IMAGES)
    (output,) = unmarked.graph.find_nodes(op="output")
    with unmarked.graph.inserting_before(output):
        output.args = (unmarked.graph.call_function(len, output.args),)
    huge = folded_network(flat_cnn(), IMAGES)
    (output,) = huge.graph.find_nodes(op="output")
    with huge.graph.inserting_before(output):
        output.args = (huge.graph.call_method("expand", (output.args[0], 10**6, 10**6)),)
    for network, message in ((local, "Local"), (unmarked, "builtins.len"), (huge, "expand is asked for 1e\\+12")):
        with pytest.raises(UserError, match=f"cannot be saved.*{message}"):
            save_folded(network, tmp_path / "net")
        assert not (tmp_path / "net").exists()


def test_the_name_of_a_class_cannot_be_code(checkpoint):
    target = {"outside": "a.B", "fields": ["x"]}
    node = {"name": "extra", "op": "call_function", "target": target, "args": [1], "kwargs": {}}
    edit(checkpoint, lambda document: document["graph"].insert(1, node))
    load_folded(checkpoint)(IMAGES)
    changes = [{"outside": "a.B()"}, {"outside": ""}, {"fields": ["x, y"]}, {"fields": ["_x"]}, {"fields": ["x", "x"]}]
    for change in changes:
        edit(checkpoint, lambda document, change=change: document["graph"][1]["target"].update({**target, **change}))
        refused(checkpoint, "cannot be loaded")


def test_a_layer_changed_after_construction_needs_the_model(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2, padding_mode="reflect"), nn.ReLU())
    model[0].padding = (1, 1)  # no effect: what is padded was computed by the constructor
    folded = folded_network(model, IMAGES, weight_bits=None)
    assert save_folded(folded, tmp_path / "net") == ("0 (torch.nn.modules.conv.Conv2d)",)
    assert_same(folded, load_folded(tmp_path / "net", model=model), IMAGES)


def test_a_hooked_layer_needs_the_model(tmp_path):
    folded = folded_network(flat_cnn(), IMAGES)
    folded.get_submodule("2").register_forward_hook(lambda module, args, output: output + 1)
    assert save_folded(folded, tmp_path / "net") == ("2 (torch.nn.modules.activation.ReLU)",)
