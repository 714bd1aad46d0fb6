"""A checkpoint made to attack whoever loads it runs nothing."""

from __future__ import annotations

import pytest

from bnre_exp import UserError
from bnre_exp.export.checkpoint.save_load import load_folded
from tests.export.saving import IMAGES, edit, refused

X = {"node": "input_1"}
HOSTILE_CALLS = [
    ("call_function", "os.system", ["touch canary"]),
    ("call_function", "posix.system", ["touch canary"]),
    ("call_function", "builtins.eval", ["open('canary', 'w')"]),
    ("call_function", "builtins.exec", ["open('canary', 'w')"]),
    ("call_function", "builtins.__import__", ["this"]),
    ("call_function", "builtins.open", ["canary", "w"]),
    ("call_function", "torch.load", ["canary"]),
    ("call_function", "torch.save", [X, "canary"]),
    ("call_function", "torch.from_file", ["canary"]),
    ("call_function", "torch.hub.load", ["a/b", "c"]),
    ("call_function", "torch.ops.load_library", ["canary.so"]),
    ("call_function", "torch.classes.load_library", ["canary.so"]),
    ("call_function", "torch.compile", [X]),
    ("call_function", "torch.set_default_dtype", [{"dtype": "float64"}]),
    ("call_function", "torch.manual_seed", [0]),
    ("call_function", "torch.nn.functional.handle_torch_function", [X]),
    ("call_function", "torch.overrides.os.system", ["touch canary"]),
    ("call_function", "operator.attrgetter", ["__class__"]),
    ("call_function", "operator.methodcaller", ["numpy"]),
    ("call_function", "operator.setitem", [X, 0, 0]),
    ("call_function", "operator.call", [X]),
    ("call_function", "builtins.getattr", [X, "__class__"]),
    ("call_function", "builtins.getattr", [X, "data"]),
    ("call_function", "builtins.getattr", [X, X]),
    ("call_function", "builtins.getattr", [X, "shape", 1]),
    ("call_function", "builtins.setattr", [X, "a", 1]),
    ("call_function", {"outside": "os.system"}, ["touch canary"]),
    ("call_function", ["torch.add"], [X, X]),
    ("call_method", "__class__", [X]),
    ("call_method", "__reduce__", [X]),
    ("call_method", "numpy", [X]),
    ("call_method", "apply_", [X, X]),
    ("call_method", "register_hook", [X, X]),
    ("call_method", "data_ptr", [X]),
    ("call_method", "set_", [X]),
    ("call_method", "format", ["{0.__class__}", X]),
    ("call_method", "view.__func__", [X]),
    ("call_method", 'to; open("canary", "w")', [X]),
    ("call_module", "nowhere", [X]),
    ("call_module", "", [X]),
    ("call_module", "0.parametrizations", [X]),
    ("get_attr", "0.__class__", []),
    ("get_attr", "__init__.__globals__", []),
    ("get_attr", "forward", []),
    ("call_shell", "torch.add", [X, X]),
    ("output", "print", [X]),
    ("placeholder", "x2=open('canary', 'w')", []),
    ("placeholder", "x2): pass\nopen('canary', 'w')\ndef f(a", []),
]


@pytest.mark.parametrize(("op", "target", "args"), HOSTILE_CALLS)
def test_hostile_targets(checkpoint, op, target, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = {"name": "extra", "op": op, "target": target, "args": args, "kwargs": {}}
    edit(checkpoint, lambda document: document["graph"].insert(1, node))
    refused(checkpoint, "the node 'extra' is not allowed|it holds os.system")
    assert not (tmp_path / "canary").exists()


INJECTION = "a = open('canary', 'w')"


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.update(name=INJECTION),
        lambda node: node.update(name="import"),
        lambda node: node.update(name="input_1"),
        lambda node: node.update(kwargs={f"{INJECTION}, b": 1}),
        lambda node: node.update(kwargs={"lambda": 1}),
        lambda node: node.update(args=[{"node": INJECTION}]),
        lambda node: node.update(args=[{"node": "linear"}]),
        lambda node: node.update(args=[{"dtype": "load"}]),
        lambda node: node.update(args=[{"memory_format": INJECTION}]),
        lambda node: node.update(args=[{"device": INJECTION}]),
        lambda node: node.update(args=[{"float": INJECTION}]),
        lambda node: node.update(args=[{"dict": [[["a"], 1]]}]),
        lambda node: node.update(args=[{"object": "os.system"}]),
        lambda node: node.update(args=[{"node": "input_1", "tuple": []}]),
        lambda node: node.update(args=None),
        lambda node: node.pop("target"),
    ],
)
def test_hostile_nodes(checkpoint, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(checkpoint, lambda document: change(document["graph"][1]))
    refused(checkpoint, "cannot be loaded")
    assert not (tmp_path / "canary").exists()


def test_strings_stay_strings(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "'\"\"\"\\'); open('canary', 'w') #\n"
    node = {"name": "text", "op": "call_method", "target": "to", "args": [X, text], "kwargs": {}}
    edit(checkpoint, lambda document: document["graph"].insert(1, node))
    with pytest.raises(RuntimeError):  # not a device
        load_folded(checkpoint)(IMAGES)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["modules"]["2"].update(type="torch.nn.DataParallel"),
        lambda d: d["modules"]["2"].update(type="torch.nn.Module"),
        lambda d: d["modules"]["2"].update(type="torch.hub.load"),
        lambda d: d["modules"]["2"].update(type="subprocess.Popen", args={"args": "touch canary"}),
        lambda d: d["modules"]["2"].update(type="bnre_exp.quantsim.trace.FollowTraining", args={"function": "load"}),
        lambda d: d["modules"]["2"].update(args={"nonsense": 1}),
        lambda d: d["modules"]["0"]["args"].update(kernel_size={"tuple": [5, 5]}),
        lambda d: d["modules"]["0"]["args"].update(in_channels="many"),
        lambda d: d["modules"]["0"]["codes"].clear(),
        lambda d: d["modules"]["0"]["codes"]["weight"].update(transposed=True, groups=7),
        lambda d: d["modules"]["0"]["codes"].update(stride=d["modules"]["0"]["codes"]["weight"]),
        lambda d: d["modules"].update({'2"), open("canary", "w"), ("': d["modules"].pop("2")}),
        lambda d: d["modules"].pop("2"),
        lambda d: d["modules"].update({"2": None}),
        lambda d: d.update(name="A(open('canary', 'w'))"),
        lambda d: d.update(attributes={"2.missing": "buffer"}),
        lambda d: d.update(tensors=None),
        lambda d: d.pop("graph"),
        lambda d: d["graph"].clear(),
        lambda d: d["graph"].pop(),
        lambda d: d["graph"].insert(2, {**d["graph"][-1], "args": [X]}),
    ],
)
def test_hostile_modules_and_documents(checkpoint, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(checkpoint, change)
    refused(checkpoint, "cannot be loaded")
    assert not (tmp_path / "canary").exists()


def test_a_model_lends_only_what_it_marks(checkpoint):
    node = {"name": "extra", "op": "call_function", "target": {"outside": "tests.networks.flat_cnn"}, "args": []}
    edit(checkpoint, lambda document: document["graph"].insert(1, {**node, "kwargs": {}}))
    from tests.networks import Net

    with pytest.raises(UserError, match="tests.networks.flat_cnn is not marked with torch.fx.wrap"):
        load_folded(checkpoint, model=Net(lambda self, x: x))
