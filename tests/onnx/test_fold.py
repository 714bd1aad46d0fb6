"""Folding in ONNX models: the same function, exact codes, and a reason for whatever stays."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bnre_exp import UserError
from bnre_exp.onnx import fold_batch_norms
from bnre_exp.onnx.compare import compare_outputs
from tests.networks import BN, CONV, TRANSPOSED, Net, flat_cnn, randomize
from tests.onnx.models import bn, bn_tensors, built, dynamo, run, torchscript, values_of

RANDOM = np.random.default_rng(0)


def fold_and_compare(model, x, error: float = 1e-5):
    before = copy.deepcopy(model)
    folded, report = fold_batch_norms(model)
    assert model == before
    onnx.checker.check_model(folded, full_check=True)
    assert compare_outputs(model, folded, [x]) <= error
    left = sum(node.op_type == "BatchNormalization" for node in folded.graph.node)
    assert left == len(report.kept)
    return folded, report


@pytest.mark.parametrize("exporter", [dynamo, torchscript])
def test_exported_network(exporter):
    x = torch.randn(5, 3, 12, 12)
    folded, report = fold_and_compare(exporter(randomize(flat_cnn()), x), x)
    assert [name for _, name in report.folded] == ["1", "4", "7"] and not report.kept and not report.notes
    assert not any("running" in name for name in values_of(folded))


@pytest.mark.parametrize("kind", [CONV, TRANSPOSED])
def test_convolutions(kind):
    """In one, two and three dimensions, without groups and with them, side by side."""
    cases = [(dim, groups) for dim in (1, 2, 3) for groups in (1, 2)]
    layers = {
        f"layer{dim}{groups}": nn.Sequential(
            kind[dim](4, 6, 2, groups=groups, bias=groups == 1 or dim == 3), BN[dim](6)
        )  # torch exports Conv3d without bias wrongly
        for dim, groups in cases
    }

    def forward(self, x):
        images = {1: x[..., 0, 0], 2: x[..., 0], 3: x}
        return tuple(self.get_submodule(f"layer{dim}{groups}")(images[dim]) for dim, groups in cases)

    x = torch.randn(3, 4, 4, 4, 4)
    report = fold_and_compare(dynamo(randomize(Net(forward, **layers)), x), x)[1]
    assert sorted(name for _, name in report.folded) == [f"{name}.1" for name in layers] and not report.kept


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"beta": 0.0}])
@pytest.mark.parametrize("bias", ["none", "scalar", "vector"])
def test_gemm(bias, attributes):
    weight = RANDOM.normal(size=(6, 4) if attributes.get("transB") else (4, 6)).astype(np.float32)
    tensors = {"w": weight, **bn_tensors(6)}
    if bias != "none":
        tensors["c"] = np.float32(RANDOM.normal(size=() if bias == "scalar" else 6))
    inputs = ["x", "w", *(["c"] if bias != "none" else [])]
    model = built([helper.make_node("Gemm", inputs, ["h"], **attributes), bn("h", "y")], tensors, ["N", 4])
    assert len(fold_and_compare(model, torch.randn(5, 4))[1].folded) == 1


def test_matmul():
    tensors = {"w": RANDOM.normal(size=(4, 6)).astype(np.float32), **bn_tensors(6)}
    model = built([helper.make_node("MatMul", ["x", "w"], ["h"]), bn("h", "y")], tensors, ["N", 4])
    folded, report = fold_and_compare(model, torch.randn(5, 4))
    assert len(report.folded) == 1 and [node.op_type for node in folded.graph.node] == ["MatMul", "Add"]


def quantized(codes, scale, zero=None, bias=None, axis=0, input_quantized=True, channels=4):
    """x → Q → DQ → Conv(DQ of codes) → BN → y."""
    tensors = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "w": codes,
        "ws": np.asarray(scale, np.float32),
        **bn_tensors(channels),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", *(["wz"] if zero is not None else [])], ["v"], axis=axis),
        helper.make_node("Conv", ["d" if input_quantized else "x", "v", *(["b"] if bias is not None else [])], ["c"]),
        bn("c", "y"),
    ]
    if not input_quantized:
        nodes = nodes[2:]
    if zero is not None:
        tensors["wz"] = np.asarray(zero)
    if bias is not None:
        tensors["b"] = bias
    return built(nodes, tensors, ["N", 3, 6, 6])


CODES = RANDOM.integers(-7, 8, (4, 3, 3, 3)).astype(np.int8)
X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2


def test_codes_change_at_most_their_sign_and_the_bias_becomes_int32():
    bias = RANDOM.normal(size=4).astype(np.float32)
    model = quantized(CODES, [0.1, 0.2, 0.3, 0.4], np.zeros(4, np.int8), bias)
    folded, report = fold_and_compare(model, X, error=1e-3)  # the bias is rounded
    values, old = values_of(folded), values_of(model)
    gain = old["bn.weight"] / np.sqrt(old["bn.running_var"] + np.float32(1e-5))
    np.testing.assert_array_equal(values["y_codes"], CODES * np.sign(gain)[:, None, None, None].astype(np.int8))
    scale = np.where(gain == 0, old["ws"], old["ws"] * np.abs(gain))
    np.testing.assert_allclose(values["y_scale"], scale, rtol=1e-6)
    assert values["y_bias_codes"].dtype == np.int32
    np.testing.assert_allclose(values["y_bias_scale"], np.float32(0.05) * scale, rtol=1e-6)
    assert not report.notes and {node.op_type for node in folded.graph.node} == {
        "QuantizeLinear",
        "DequantizeLinear",
        "Conv",
    }


def test_per_tensor_scale_becomes_one_per_channel_and_float_input_keeps_a_float_bias():
    folded, report = fold_and_compare(quantized(CODES, 0.1, np.int8(0), axis=1, input_quantized=False), X)
    assert values_of(folded)["y_scale"].shape == (4,) and "y_bias" in values_of(folded)
    assert any("scale per channel" in note for _, note in report.notes)


def test_zero_points_and_four_bits():
    unsigned = RANDOM.integers(100, 156, (4, 3, 3, 3)).astype(np.uint8)
    fold_and_compare(quantized(unsigned, 0.1, np.uint8(128), input_quantized=False), X)
    packed = helper.make_tensor("w", TensorProto.INT4, CODES.shape, CODES.flatten())
    model = quantized(CODES, [0.1] * 4, np.zeros(4, np.int8), input_quantized=False)
    for tensor in list(model.graph.initializer):
        if tensor.name == "w":
            tensor.CopyFrom(packed)
        if tensor.name == "wz":
            tensor.CopyFrom(helper.make_tensor("wz", TensorProto.INT4, [4], [0] * 4))
    model.opset_import[0].version, model.ir_version = 21, 10
    folded, _ = fold_and_compare(model, X)
    (codes,) = (tensor for tensor in folded.graph.initializer if tensor.name == "y_codes")
    assert codes.data_type == TensorProto.INT4
    values = numpy_helper.to_array(codes).astype(np.int8)
    np.testing.assert_array_equal(
        np.abs(values), np.abs(CODES) * (values_of(model)["bn.weight"] != 0)[:, None, None, None]
    )


def test_a_code_without_a_negative_is_never_clipped():
    codes = CODES.copy()
    codes[1, 0, 0, 0] = -128
    model = quantized(codes, [0.1] * 4, np.zeros(4, np.int8), input_quantized=False)
    for tensor in model.graph.initializer:
        if tensor.name == "bn.weight":
            tensor.CopyFrom(numpy_helper.from_array(np.float32([1, -1, 1, 1]), "bn.weight"))
    _, report = fold_and_compare(model, X)
    ((name, reason),) = report.kept
    assert name == "bn" and "-128" in reason


def test_a_bias_beyond_int32_stays_in_floating_point_and_is_named():
    model = quantized(CODES, [1e-12] * 4, np.zeros(4, np.int8))
    folded, report = fold_and_compare(model, X)
    assert "y_bias" in values_of(folded) and any("does not fit int32" in note for _, note in report.notes)


def test_a_weight_that_others_read_stays_theirs():
    tensors = {"w": RANDOM.normal(size=(3, 3, 1, 1)).astype(np.float32), **bn_tensors(3)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), bn("a", "b"), helper.make_node("Conv", ["b", "w"], ["y"])]
    folded, report = fold_and_compare(built(nodes, tensors, ["N", 3, 6, 6]), X)
    assert len(report.folded) == 1
    np.testing.assert_array_equal(values_of(folded)["w"], tensors["w"])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.bn(x), "reads an input"),
        (lambda self, x: self.bn(torch.relu(self.conv(x))), "no convolution or Gemm"),
        (lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), "another consumer"),
    ],
)
def test_kept_with_a_reason(forward, reason):
    model = randomize(Net(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    _, report = fold_and_compare(dynamo(model, X), X)
    ((name, why),) = report.kept
    assert name == "bn" and reason in why


def test_linear_on_three_axes_is_never_folded():
    model = Net(lambda self, x: self.bn(self.linear(x)), linear=nn.Linear(5, 5), bn=nn.BatchNorm1d(7))
    x = torch.randn(3, 7, 5)
    assert len(fold_and_compare(dynamo(randomize(model), x), x)[1].kept) == 1


def test_without_batch_norm():
    with pytest.raises(UserError, match="folded already, or never had one"):
        fold_batch_norms(built([helper.make_node("Relu", ["x"], ["y"])], {}, ["N", 3]))
    assert run(built([helper.make_node("Relu", ["x"], ["y"])], {}, ["N", 3]), torch.ones(2, 3))[0].all()


def with_tensors(model: onnx.ModelProto, **values) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name.replace(".", "_") in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name.replace(".", "_")], tensor.name))
    return model


def conv_bn(**values) -> onnx.ModelProto:
    tensors = {"w": RANDOM.normal(size=(4, 3, 1, 1)).astype(np.float32), **bn_tensors(4)}
    model = built([helper.make_node("Conv", ["x", "w"], ["c"]), bn("c", "y")], tensors, ["N", 3, 6, 6])
    return with_tensors(model, **values)


def test_numbers_that_are_not_finite_are_never_written():
    folded, report = fold_batch_norms(conv_bn(bn_weight=np.float32([3e38] * 4)))
    assert len(report.kept) == 1 and "not finite" in report.kept[0][1]
    assert all(np.isfinite(x).all() for x in values_of(folded).values())


def test_a_gemm_bias_per_row_is_no_bias_per_channel():
    tensors = {"w": RANDOM.normal(size=(3, 4)).astype(np.float32), "c": RANDOM.normal(size=(4, 1)).astype(np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "w", "c"], ["h"]), bn("h", "y")]
    _, report = fold_and_compare(built(nodes, {**tensors, **bn_tensors(4)}, [4, 3]), torch.randn(4, 3))
    assert "not one per channel" in report.kept[0][1]


def test_names_that_are_taken():
    model = quantized(CODES, [0.1] * 4, np.zeros(4, np.int8))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "bn.weight":
                node.input[index] = "y_weight"
    for tensor in model.graph.initializer:
        if tensor.name == "bn.weight":
            tensor.name = "y_weight"
    assert len(fold_and_compare(model, X, error=1e-3)[1].folded) == 1


def test_training_outputs_and_other_domains_are_kept():
    model = conv_bn()
    model.graph.node[1].output.extend(["m", "v"])
    assert "training mode" in fold_batch_norms(model)[1].kept[0][1]
    model = quantized(CODES, [0.1] * 4, np.zeros(4, np.int8))
    model.graph.node[2].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "com.microsoft" in fold_batch_norms(model)[1].kept[0][1]
    (other := conv_bn()).graph.node[0].domain = "acme"
    assert "no convolution or Gemm" in fold_batch_norms(other)[1].kept[0][1]


def test_the_comparison_can_fail():
    model = conv_bn()
    changed = with_tensors(conv_bn(), w=values_of(model)["w"] * 1.01)
    assert compare_outputs(model, with_tensors(changed, bn_bias=values_of(model)["bn.bias"]), [X]) > 1e-3
    broken = with_tensors(conv_bn(), w=np.full((4, 3, 1, 1), np.nan, np.float32))
    assert compare_outputs(model, broken, [X]) == np.inf
    with pytest.raises(UserError, match="outputs are not finite"):
        compare_outputs(broken, broken, [X])


def test_batch_norms_inside_and_incomplete_ones_are_named_or_left_alone():
    body = helper.make_graph(
        [bn("c", "inside")], "body", [], [helper.make_tensor_value_info("inside", 1, ["N", 4, 6, 6])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", 1, ["N", 4, 6, 6])],
    )
    tensors = {"w": RANDOM.normal(size=(4, 3, 1, 1)).astype(np.float32), "yes": np.array(True), **bn_tensors(4)}
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other)
    model = built([helper.make_node("Conv", ["x", "w"], ["c"]), choice], tensors, ["N", 3, 6, 6])
    folded, report = fold_batch_norms(model)
    assert report.kept == (("bn", "it is in the body of an If or Loop"),) and not report.folded
    assert compare_outputs(model, folded, [X]) == 0
    short = conv_bn()
    del short.graph.node[1].input[3:]
    with pytest.raises(UserError, match="folded already, or never had one"):
        fold_batch_norms(short)


def test_a_model_of_the_time_when_initializers_were_inputs_stays_valid():
    model = conv_bn()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.opset_import[0].version = 8
    folded, report = fold_batch_norms(model)
    assert len(report.folded) == 1 and folded.ir_version == 4 and model.ir_version == 3
    onnx.checker.check_model(folded, full_check=True)
