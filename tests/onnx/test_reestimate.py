"""Statistics through ONNX Runtime are those of torch, and nothing else in the model changes."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import bnre_exp
from bnre_exp import UserError
from bnre_exp.onnx import reestimate_bn_stats
from tests.networks import Net, flat_cnn, randomize, unequal_batches
from tests.onnx.models import bn, bn_tensors, built, dynamo, torchscript, values_of
from tests.torchvision_networks import network, small_or_slow

BATCHES = unequal_batches((3, 12, 12))
METHODS = ["batch_average", "pooled", "ema"]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if "running" in name}


def changed(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    """Initializers whose values differ; everything else must be equal."""
    first, second = values_of(before), values_of(after)
    assert first.keys() == second.keys()
    emptied = [copy.deepcopy(model) for model in (before, after)]
    for model in emptied:
        del model.graph.initializer[:]
    assert emptied[0] == emptied[1]
    return {name for name in first if not np.array_equal(first[name], second[name])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exporter", [dynamo, torchscript])
def test_same_statistics_as_torch(exporter, method):
    model = randomize(flat_cnn())
    proto = exporter(model, BATCHES[0])
    before = copy.deepcopy(proto)
    handle = reestimate_bn_stats(proto, BATCHES, 6, method=method)
    bnre_exp.reestimate_bn_stats(model, BATCHES, 6, method=method)
    assert changed(before, proto) == set(statistics(model))
    values = values_of(proto)
    for name, wanted in statistics(model).items():
        np.testing.assert_allclose(values[name], wanted, rtol=2e-5, atol=2e-5)
    assert (handle.num_batches, handle.loader_passes, handle.skipped) == (6, 2, ())
    assert handle.reestimated == ("1", "4", "7")
    handle.remove()
    assert proto == before
    handle.remove()
    with reestimate_bn_stats(proto, BATCHES, 2):
        assert proto != before
    assert proto == before


@pytest.mark.parametrize("name", small_or_slow("small mobilenet_v2", "mobilenet_v2"))
def test_a_deep_network_within_torchs_own_rounding(name):
    torch.manual_seed(0)
    model = network(name).eval()
    batches = [torch.randn(6, 3, 64, 64) * (i + 1) for i in range(2)]
    proto = dynamo(model, batches[0])
    reestimate_bn_stats(proto, batches, 2)
    double = copy.deepcopy(model).double()
    bnre_exp.reestimate_bn_stats(model, batches, 2)
    bnre_exp.reestimate_bn_stats(double, [x.double() for x in batches], 2)
    values, single, precise = values_of(proto), statistics(model), statistics(double)

    def deviation(first, second):
        worst = 0.0
        for name in precise:
            if name.endswith("mean"):
                spread = precise[name.replace("mean", "var")].clamp_min(1e-12)
                mean = (first[name] - second[name]).abs() / spread.sqrt()
                var = name.replace("mean", "var")
                worst = max(worst, float(mean.max()), float(((first[var] - second[var]).abs() / spread).max()))
        return worst

    found = {name: torch.tensor(values[name]).double() for name in precise}
    single = {name: x.double() for name, x in single.items()}
    assert 0 < deviation(found, single) <= 3 * deviation(single, precise)


@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
@pytest.mark.parametrize("opset", [9, 13, 15, 18, 21])
def test_one_batch_norm_at_every_rank_and_opset(ndim, opset):
    shape = (5, 4, 3, 2)[: ndim - 1]
    proto = built([bn("x", "y")], bn_tensors(5), ["N", *shape], opset)
    batches = unequal_batches(shape)
    reestimate_bn_stats(proto, batches, 4, method="pooled")
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], dim=1).double()
    values = values_of(proto)
    np.testing.assert_allclose(values["bn.running_mean"], rows.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["bn.running_var"], rows.var(1), rtol=1e-5)


def test_called_twice_sees_both_calls():
    model = randomize(
        Net(lambda self, x: self.bn(self.conv(self.bn(self.conv(x)))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    )
    proto = dynamo(model, BATCHES[0])
    handle = reestimate_bn_stats(proto, BATCHES, 4)
    bnre_exp.reestimate_bn_stats(model, BATCHES, 4)
    values = values_of(proto)
    assert handle.reestimated == ("bn",)
    for name, wanted in statistics(model).items():
        np.testing.assert_allclose(values[name], wanted, rtol=2e-5, atol=2e-5)


def test_tensors_that_others_read_are_left_alone():
    """Exporters keep equal tensors once: here a mean is also a bias, and two batch norms share everything."""
    tensors = {**bn_tensors(3), "zeros": np.zeros(3, np.float32), "ones": np.ones(3, np.float32)}
    shared = ["zeros", "zeros", "ones"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", "ones", *shared], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("BatchNormalization", ["b", "ones", *shared], ["c"]),
        bn("c", "y"),
    ]
    proto = built(nodes, tensors, ["N", 3, 12, 12])
    handle = reestimate_bn_stats(proto, BATCHES, 4, method="pooled")
    onnx.checker.check_model(proto, full_check=True)
    values = values_of(proto)
    assert not values["zeros"].any() and (values["ones"] == 1).all() and len(handle.reestimated) == 3
    x = torch.cat(BATCHES).transpose(0, 1).flatten(1).double()
    first, second = (node for node in proto.graph.node if node.output[0] in "ac")
    assert set(first.input[3:]).isdisjoint(second.input[3:])
    np.testing.assert_allclose(values[first.input[3]], x.mean(1), rtol=1e-5)
    assert values[second.input[3]].min() > 0.05  # after the ReLU


def test_quantized_model_and_constant_nodes_and_old_style_inputs():
    tensors = bn_tensors(4)
    tensors |= {
        "w": np.random.default_rng(0).integers(-7, 8, (4, 3, 1, 1)).astype(np.int8),
        "ws": np.full(4, 0.1, np.float32),
    }
    tensors |= {"wz": np.zeros(4, np.int8), "s": np.float32(0.05), "z": np.uint8(128)}
    mean = tensors.pop("bn.running_mean")
    nodes = [
        helper.make_node("Constant", [], ["bn.running_mean"], value=onnx.numpy_helper.from_array(mean)),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=0),
        helper.make_node("Conv", ["d", "v"], ["c"]),
        bn("c", "y"),
    ]
    proto = built(nodes, tensors, ["N", 3, 12, 12])
    proto.graph.input.append(helper.make_tensor_value_info("bn.running_var", 1, [4]))  # IR version 3 asked for this
    reestimate_bn_stats(proto, BATCHES, 4, method="pooled")
    x = torch.cat(BATCHES)
    grid = ((x / 0.05).round() + 128).clamp(0, 255).sub(128).mul(0.05)
    weight = torch.from_numpy(tensors["w"].astype(np.float32) * 0.1)
    rows = nn.functional.conv2d(grid, weight).transpose(0, 1).flatten(1).double()
    np.testing.assert_allclose(values_of(proto)["bn.running_var"], rows.var(1), rtol=1e-4)
    constant = onnx.numpy_helper.to_array(proto.graph.node[0].attribute[0].t)
    np.testing.assert_allclose(constant, rows.mean(1), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_reestimated_is_named():
    nodes = [bn("x", "a", training_mode=1), bn("a", "y", "second")]
    nodes[0].output.extend(["m", "v"])
    proto = built(nodes, {**bn_tensors(3), **bn_tensors(3, "second")}, ["N", 3, 12, 12])
    handle = reestimate_bn_stats(proto, BATCHES, 2)
    assert handle.reestimated == ("second",)
    ((name, reason),) = handle.skipped
    assert name == "bn" and "training mode" in reason


def small(**shape) -> onnx.ModelProto:
    return built([bn("x", "y")], bn_tensors(3), shape.get("shape", ["N", 3, 12, 12]), shape.get("opset", 18))


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (built([helper.make_node("Relu", ["x"], ["y"])], {}, ["N", 3]), BATCHES, {}, "has no BatchNormalization"),
        (small(opset=8), BATCHES, {}, "has opset 8; expected 9 or higher"),
        (small(opset=99), BATCHES, {}, "ONNX Runtime .* does not take the model"),
        (small(shape=[1, 3, 12, 12]), BATCHES, {}, r"batch size is fixed: give batches of 1"),
        (small(shape=["N", 3, 32, 32]), BATCHES, {}, r"has the shape \[N, 3, 32, 32\]; the data are \[8, 3, 12, 12\]"),
        (small(), [torch.ones(4, 3)], {}, r"the data are \[4, 3\]"),
        (small(shape=["N", 3]), [torch.ones(1, 3)], {}, "one value per channel"),
        (small(), [], {}, "yields no batches"),
        (small(), [{"y": BATCHES[0]}], {}, "has the inputs y; the model has x"),
        (small(), ["text"], {}, "of type str"),
        (small(), [BATCHES[0] * np.nan], {}, "Batch 1 of the data holds values that are not finite for the input x"),
        (small(), BATCHES, {"method": "median"}, "method='median'"),
        (small(), BATCHES, {"num_batches": 0}, "num_batches=0"),
    ],
)
def test_one_clear_error_and_nothing_changed(model, batches, options, message):
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=message):
        reestimate_bn_stats(model, batches, **{"num_batches": 2, **options})
    assert model == before


def test_statistics_handed_on_by_identity():
    """The older exporter keeps equal tensors once: variances of one, with means of their own."""
    model = randomize(flat_cnn())
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1)
    proto = torchscript(model, BATCHES[0])
    before = copy.deepcopy(proto)
    handle = reestimate_bn_stats(proto, BATCHES, 4)
    assert len(handle.reestimated) == 3 and not handle.skipped
    bnre_exp.reestimate_bn_stats(model, BATCHES, 4)
    values = values_of(proto)
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    wanted = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    for node, module in zip(nodes, wanted, strict=True):
        np.testing.assert_allclose(values[node.input[3]], module.running_mean, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(values[node.input[4]], module.running_var, rtol=2e-5)
    handle.remove()
    assert proto == before


def test_what_a_type_does_not_hold_is_refused():
    half = {name: value.astype(np.float16) for name, value in bn_tensors(3).items()}
    proto = built([bn("x", "y")], half, ["N", 3])
    for item in (*proto.graph.input, *proto.graph.output):
        item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    before = copy.deepcopy(proto)
    with pytest.raises(UserError, match="values that its type does not hold"):
        reestimate_bn_stats(proto, [torch.randn(8, 3).clamp(-2, 2).half() * 3e4], 1)
    assert proto == before
    reestimate_bn_stats(proto, [torch.randn(8, 3).half()], 1)
    assert values_of(proto)["bn.running_var"].dtype == np.float16


def test_undoing_leaves_other_changes_alone():
    proto = built(
        [bn("x", "a"), bn("a", "y", "second")], {**bn_tensors(3), **bn_tensors(3, "second")}, ["N", 3, 12, 12]
    )
    old = values_of(proto)
    handle = reestimate_bn_stats(proto, BATCHES, 2)
    proto.graph.node[0].name = "renamed"
    handle.remove()
    assert proto.graph.node[0].name == "renamed"
    assert all(np.array_equal(value, values_of(proto)[name]) for name, value in old.items())
