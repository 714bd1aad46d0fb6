"""ONNX files made to exhaust a machine, or damaged, are one plain error that names the file and the reason."""

from __future__ import annotations

import copy
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bnre_exp import UserError
from bnre_exp.models.build import build_model
from bnre_exp.onnx import fold_batch_norms, load_model, reestimate_bn_stats
from bnre_exp.onnx.__main__ import main
from bnre_exp.onnx_io import session
from tests.onnx.models import bn, bn_tensors, built

make = helper.make_node


def with_nodes(*nodes, shape=("N", 3, 8, 8), **tensors) -> onnx.ModelProto:
    """x → BN → y, with more nodes of which nothing becomes of y."""
    graph = helper.make_graph(
        [*nodes, bn("x", "y")], "graph", [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(name, 1, None) for name in ("y", *(nodes[-1].output if nodes else ()))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in {**bn_tensors(3), **tensors}.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def loop(rounds: int | None, condition: str = "go", until: float = 0.0) -> onnx.ModelProto:
    """Adds 1 to x's batch norm for so many rounds; condition: what says whether to go on."""
    info = helper.make_tensor_value_info
    nodes = [
        make("Add", ["state", "one"], ["more"]),
        make("ReduceMax", ["more"], ["largest"], keepdims=0),
        make("Less", ["largest", "until"], ["below"]),
        make("Identity", ["go"], ["same"]),
    ]
    body = helper.make_graph(
        [*nodes, make("Identity", [condition], ["on"])], "body",
        [info("i", 7, []), info("go", 9, []), info("state", 1, None)], [info("on", 9, []), info("more", 1, None)],
    )  # fmt: skip
    names = ["" if rounds is None else "rounds", "yes", "x"]
    tensors = {"one": np.float32(1), "until": np.float32(until), "yes": np.array(True)}
    tensors |= {} if rounds is None else {"rounds": np.int64(rounds)}
    return with_nodes(make("Loop", names, ["z"], body=body, name="turns"), **tensors)


def sized(**changes) -> onnx.ModelProto:
    model = with_nodes()
    tensor = next(x for x in model.graph.initializer if x.name == "bn.bias")
    if "dims" in changes:
        tensor.dims[:] = changes["dims"]
    if changes.get("empty"):
        tensor.ClearField("raw_data")
    return model


ATTACKS = {
    "loop": (lambda: loop(2**62), "the loop turns goes on for 4611686018427387904 rounds"),
    "loop without rounds": (lambda: loop(None, "same"), "the loop turns goes on for inf rounds"),
    "input": (lambda: with_nodes(shape=("N", 3, 10**5, 10**5)), "x has 3 x 100000 x 100000 elements"),
    "initializer by shape only": (lambda: sized(dims=[10**6, 10**6], empty=True), "bn.bias does not hold the values"),
    "initializer of another shape": (lambda: sized(dims=[4]), r"bn.bias does not hold .* its shape \[4\]"),
    "initializer of negative size": (lambda: sized(dims=[-1, -3]), "bn.bias does not hold the values"),
    "constant": (
        lambda: with_nodes(make("ConstantOfShape", ["size"], ["z"]), size=np.int64([10**6, 10**6])),
        "z has 1000000 x 1000000 elements",
    ),
    "computed constant": (
        lambda: with_nodes(
            make("Mul", ["size", "size"], ["more"]),
            make("ConstantOfShape", ["more"], ["z"]),
            size=np.int64([10**4] * 2),
        ),
        "z has 100000000 x 100000000 elements",
    ),
    "many constants": (
        lambda: with_nodes(
            *(make("ConstantOfShape", ["size"], [f"z{i}"]) for i in range(9)), size=np.int64([2**14, 2**13])
        ),
        "what the model computes from constants alone has 1207959552 elements",
    ),
    "tile": (lambda: with_nodes(make("Tile", ["x", "by"], ["z"]), by=np.int64([1, 10**9, 1, 1])), "z has 3000000000"),
    "expand": (lambda: with_nodes(make("Expand", ["x", "to"], ["z"]), to=np.int64([10**9, 3, 8, 8])), "z has 10000000"),
    "range": (
        lambda: with_nodes(make("Range", ["a", "b", "c"], ["z"]), a=np.int64(0), b=np.int64(10**12), c=np.int64(1)),
        "z has 1000000000000 elements",
    ),
    "random": (lambda: with_nodes(make("RandomNormal", [], ["z"], shape=[10**5, 10**5])), "z has 100000 x 100000"),
    "resize": (
        lambda: with_nodes(make("Resize", ["x", "", "", "to"], ["z"]), to=np.int64([1, 3, 10**6, 10**6])),
        "z has 1 x 3 x 1000000 x 1000000",
    ),
    "pad": (
        lambda: with_nodes(make("Pad", ["x", "by"], ["z"]), by=np.int64([0, 0, 10**6, 10**6, 0, 0, 0, 0])),
        "z has 3 x 1000008 x 1000008",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name(attack, tmp_path, capsys):
    make_model, message = ATTACKS[attack]
    model, path, out = make_model(), tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=message):
        build_model("bnre_exp.models.onnx_model", path=str(path), num_classes=10)
    for function in (fold_batch_norms, lambda model: reestimate_bn_stats(model, [torch.ones(2, 3, 8, 8)], 1)):
        with pytest.raises(UserError, match=message):
            function(model)
    np.save(tmp_path / "data.npy", np.ones((2, 3, 8, 8), np.float32))
    for command in (["fold"], ["reestimate", "--data", str(tmp_path / "data.npy")]):
        assert main([command[0], str(path), str(out), *command[1:]]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and str(path) in error and error.count("\n") == 1 and not out.exists()


def test_sparse_tensors_are_as_large_as_they_say():
    model = with_nodes()
    values, indices = helper.make_tensor("sparse", 1, [1], [2.0]), helper.make_tensor("indices", 7, [1], [1])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**6, 10**6]))
    with pytest.raises(UserError, match="sparse has 1000000 x 1000000 elements"):
        fold_batch_norms(model)


def test_what_ends_is_no_attack(tmp_path):
    """A while loop as exporters write it, and types of values that are packed or spelt out."""
    onnx.save(loop(2**62, "below", until=50.0), tmp_path / "in.onnx")
    model = load_model(tmp_path / "in.onnx")
    assert fold_batch_norms(model)[1].kept
    reestimate_bn_stats(model, [torch.randn(4, 3, 8, 8)], 1)
    for kind, values in (
        (TensorProto.INT4, [1, -2, 3]),
        (TensorProto.STRING, [b"a"]),
        (TensorProto.COMPLEX64, [1j, 2]),
    ):
        with_nodes_and = with_nodes()
        with_nodes_and.graph.initializer.append(helper.make_tensor("more", kind, [len(values)], values))
        with_nodes_and.graph.initializer.append(helper.make_tensor("half", TensorProto.BFLOAT16, [2], [1.0, 2.0]))
        onnx.save(with_nodes_and, tmp_path / "in.onnx")
        load_model(tmp_path / "in.onnx")


def test_a_run_without_an_end_is_ended(monkeypatch):
    model = loop(2**62, "below", until=np.inf)
    opened = session.open_session(model)
    monkeypatch.setattr(session, "LONGEST", 0.2)
    with pytest.raises(UserError, match="did not end within 0.2 s"):
        session.run_session(opened, {"x": np.ones((2, 3, 8, 8), np.float32)})


def test_only_regular_files_are_models(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "zero.onnx").symlink_to("/dev/zero")
    for name in ("pipe.onnx", "folder.onnx", "zero.onnx"):
        with pytest.raises(UserError, match=f"{name}: it is not a regular file"):
            load_model(tmp_path / name)
    onnx.save(with_nodes(), tmp_path / "in.onnx")
    os.mkfifo(tmp_path / "pipe.npy")
    assert main(["reestimate", str(tmp_path / "in.onnx"), "out.onnx", "--data", str(tmp_path / "pipe.npy")]) == 1
    assert "pipe.npy: expected" in capsys.readouterr().err


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "pipe", "link", "folder", "short", "nowhere"])
def test_values_outside_the_folder_or_missing(location, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(12))
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    (folder / "short").write_bytes(b"1234")
    model = with_nodes()
    tensor = next(x for x in model.graph.initializer if x.name == "bn.bias")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"in.onnx is not an ONNX model, or a damaged one \(."):
        load_model(folder / "in.onnx")
    with pytest.raises(UserError, match="values of the tensor bn.bias are in another file"):
        fold_batch_norms(model)


def test_truncated_and_garbled_files(tmp_path):
    whole = with_nodes(make("Relu", ["x"], ["z"])).SerializeToString()
    random = np.random.default_rng(0)
    refused = 0
    for number in range(300):
        content = bytearray(whole[: random.integers(len(whole))] if number % 2 else whole)
        for position in random.integers(len(content), size=random.integers(1, 5) if content else 0):
            content[position] = random.integers(256)
        (tmp_path / "in.onnx").write_bytes(content)
        try:
            fold_batch_norms(load_model(tmp_path / "in.onnx"))
        except UserError:
            refused += 1
    assert refused > 100


def test_nothing_is_read_from_a_file_that_is_replaced_by_text(tmp_path):
    shutil.copy(__file__, tmp_path / "in.onnx")
    with pytest.raises(UserError, match=r"in.onnx is not an ONNX model"):
        load_model(tmp_path / "in.onnx")


def with_value(name: str, index: int, value: float) -> onnx.ModelProto:
    tensors = {"w": np.ones((3, 3, 1, 1), np.float32), **bn_tensors(3), "top": np.array(np.inf, np.float32)}
    nodes = [make("Conv", ["x", "w"], ["c"], name="first"), make("Clip", ["c", "", "top"], ["d"]), bn("d", "y")]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[index] = value
    return built(nodes, tensors, ["N", 3, 8, 8])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bn.running_var", np.nan, "bn.running_var of bn .*not finite"),
        ("bn.running_var", -0.01, "bn.running_var of bn .*a negative variance, -0.01"),
        ("bn.running_var", -1e-7, "a negative variance"),
        ("bn.running_mean", np.inf, "bn.running_mean of bn .*not finite"),
        ("bn.weight", np.nan, "bn.weight of bn .*1 values that are not finite"),
        ("w", np.nan, "tensor w of first .Conv. .*not finite"),
        ("w", -np.inf, "tensor w of first .Conv. .*not finite"),
        ("top", np.nan, "tensor top of d .Clip."),
    ],
)
def test_values_that_are_not_finite_name_their_tensor_and_node(name, value, message, tmp_path, capsys):
    model = with_value(name, 0, value)
    before = copy.deepcopy(model)
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(UserError, match=message):
        fold_batch_norms(model)
    assert main(["fold", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 1
    assert not (tmp_path / "out.onnx").exists() and name in capsys.readouterr().err
    batches = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(UserError, match=message):
        reestimate_bn_stats(model, batches, 1, method="ema")
    if "running" in name:  # what comes is no function of what was
        reestimate_bn_stats(model, batches, 1)
        fold_batch_norms(model)
    else:
        with pytest.raises(UserError, match=message):
            reestimate_bn_stats(model, batches, 1)
        assert model.SerializeToString() == before.SerializeToString()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["batch_average", "pooled", "ema"])
def test_one_bad_value_in_one_batch(value, method):
    """Even where a Relu or a quantizer would swallow it."""
    nodes = [make("Relu", ["x"], ["r"]), make("QuantizeLinear", ["r", "s", "z"], ["q"])]
    nodes += [make("DequantizeLinear", ["q", "s", "z"], ["d"]), bn("d", "y")]
    model = built(nodes, {"s": np.float32(0.1), "z": np.uint8(0), **bn_tensors(3)}, ["N", 3, 8, 8])
    before = copy.deepcopy(model)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    batches[1][2, 1, 0, 3] = value
    with pytest.raises(UserError, match="Batch 2 of the data holds values that are not finite for the input x"):
        reestimate_bn_stats(model, batches, 3, method=method)
    assert model == before


def test_values_that_grow_beyond_the_type_name_the_batch_norm_and_the_batch():
    model = built(
        [make("Mul", ["x", "k"], ["m"]), bn("m", "y")], {"k": np.float32(1e38), **bn_tensors(3)}, ["N", 3, 8, 8]
    )
    with pytest.raises(UserError, match="The batch norm bn gets values that are not finite in batch 2"):
        reestimate_bn_stats(model, [torch.ones(4, 3, 8, 8), torch.ones(4, 3, 8, 8) * 9], 2)
