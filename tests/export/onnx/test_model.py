"""A folded network as an ONNX model: what is in the file, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from bnre_exp import (
    LayerRule,
    QuantScheme,
    UserError,
    activation_quantizers,
    calibrate,
    export_onnx,
    fold_batch_norms,
    integer_simulation,
    quantize,
    quantize_biases,
)
from bnre_exp.onnx_io.session import feeds, open_session
from tests.export.saving import folded_network
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network, small_or_slow

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul"}


def session(path, optimize: bool, optimized=None) -> onnxruntime.InferenceSession:
    if optimize:
        return open_session(onnx.load(path), optimized_to=optimized)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path, *x: Tensor, optimize: bool = False) -> list[np.ndarray]:
    run = session(path, optimize)
    return run.run(None, {item.name: value.numpy() for item, value in zip(run.get_inputs(), x)})


def assert_same_function(folded, path, *x: Tensor, by_itself: float = 0.02) -> None:
    """Equal but for values that float rounding puts on the other side of a tie: 2 %, by a step or two. by_itself: the
    part that may differ in the graph that ONNX Runtime makes of it, whose kernels are its own."""
    with torch.no_grad():
        wanted = folded(*x)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted.values() if isinstance(wanted, dict) else wanted)
    for optimize in (False, True):
        for a, b in zip(outputs(path, *x, optimize=optimize), wanted, strict=True):
            assert a.shape == tuple(b.shape)
            span = float(b.max() - b.min())
            differs = np.abs(a - b.numpy()) > 1e-5 * span
            assert differs.mean() <= (by_itself if optimize else 0.02), (optimize, differs.mean())
            assert np.abs(a - b.numpy()).max() <= 0.1 * span


def exported(folded, path, *x: Tensor, by_itself: float = 0.02, **options) -> onnx.ModelProto:
    export_onnx(folded, x, path, **options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert_same_function(folded, path, *x, by_itself=by_itself)
    other = [torch.cat([value, value])[: len(value) + 3] for value in x]  # the batch is dynamic
    assert_same_function(folded, path, *other, by_itself=by_itself)
    return model


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def kinds(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("bits", "opset"), [((8, 8), 21), ((4, 8), 21), ((4, 8), 13), ((3, 5), 18), ((2, 3), 21)])
def test_flat_network(bits, opset, tmp_path):
    weight_bits, act_bits = bits
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=weight_bits, act_bits=act_bits)
    model = exported(folded, tmp_path / "net.onnx", IMAGES, opset=opset)
    assert model.opset_import[0].version == opset and len(model.opset_import) == 1
    tensors = initializers(model)
    codes = tensors["0.weight_codes"]
    has_int4 = opset >= 21 and weight_bits <= 4
    assert codes.data_type == (onnx.TensorProto.INT4 if has_int4 else onnx.TensorProto.INT8)
    expected = folded.get_submodule("0").parametrizations.weight.original
    np.testing.assert_array_equal(numpy_helper.to_array(codes).astype(np.int8), expected.numpy())
    assert tensors["0.bias_codes"].data_type == onnx.TensorProto.INT32
    assert numpy_helper.to_array(tensors["0.weight_scale"]).shape == (8,)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert bool(clips) == (act_bits < 8)
    for node in clips:
        assert numpy_helper.to_array(tensors[node.input[2]]) == 2**act_bits - 1
    assert model.graph.output[0].name == "output"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_layers_run_in_integer_kernels(tmp_path):
    for act_bits in (8, 4):
        folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4, act_bits=act_bits)
        export_onnx(folded, IMAGES, tmp_path / "net.onnx")
        session(tmp_path / "net.onnx", True, tmp_path / "optimized.onnx")
        found = kinds(onnx.load(tmp_path / "optimized.onnx"))
        assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and not found["Conv"] and not found["Gemm"]


def test_no_scale_is_zero_denormal_or_a_placeholder(tmp_path):
    model = randomize(flat_cnn())  # one gamma of each BN is zero
    with torch.no_grad():
        model[1].weight[1] = 1e-38
    proto = exported(folded_network(model, IMAGES, weight_bits=4), tmp_path / "net.onnx", IMAGES)
    scales = [numpy_helper.to_array(t) for name, t in initializers(proto).items() if name.endswith("_scale")]
    values = np.concatenate([scale.ravel() for scale in scales])
    assert len(scales) > 10 and (values >= np.finfo(np.float32).tiny).all() and np.isfinite(values).all()
    assert not np.isclose(values, 1e-7, rtol=0.25).any()


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: F.relu6(F.relu(x)),
        lambda x: torch.clamp(x, -0.3, 0.7),
        lambda x: x * (torch.clamp(x + 3, 0, 6) / 6),
    ],
)
def test_two_grids_in_a_row_stay_two(activation, tmp_path):
    """ONNX Runtime makes one of Q/DQ pairs that follow each other, on a grid of its own."""
    net = Net(
        lambda m, x: m.head(activation(m.bn(m.conv(x)))),
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), head=nn.Conv2d(6, 4, 3),
    )  # fmt: skip
    folded = folded_network(randomize(net), IMAGES, weight_bits=8)
    export_onnx(folded, IMAGES, tmp_path / "net.onnx")
    run = open_session(onnx.load(tmp_path / "net.onnx"))
    with torch.no_grad():
        wanted = integer_simulation(folded)(IMAGES)
    np.testing.assert_array_equal(run.run(None, feeds(run, IMAGES))[0], wanted.numpy())


def attention_like(self, x):
    y = self.proj(x.flatten(2).transpose(1, 2))  # a linear layer on [N, L, C]
    return (torch.softmax(y @ y.transpose(1, 2), dim=-1) @ y).mean(1)


def squeeze_and_excite(self, x):
    x = F.hardswish(self.bn(self.conv(x)))
    return torch.flatten(x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1))), 1)


def branches(self, x):
    y = F.relu6(self.bn(self.conv(x)))
    z = F.max_pool2d(torch.cat([y, F.relu6(self.conv(x) * 0.5)], 1), 2)
    return {"sum": (y + y.flip(1)).mean((2, 3)), "head": self.head(torch.flatten(F.avg_pool2d(z, 3), 1))}


CONV = {"conv": nn.Conv2d(3, 6, 3, padding=1), "bn": nn.BatchNorm2d(6)}
NETWORKS = {
    "attention": (attention_like, {"proj": nn.Linear(3, 8)}, IMAGES[..., :8, :8]),
    "squeeze": (squeeze_and_excite, {**CONV, "gate": nn.Conv2d(6, 6, 1)}, IMAGES[..., :8, :8]),
    "branches": (branches, {**CONV, "head": nn.Linear(48, 4)}, IMAGES[..., :12, :12]),
    "transposed": (
        lambda self, x: self.bn(self.conv(x)),
        {"conv": nn.ConvTranspose2d(3, 5, 3, 2), "bn": nn.BatchNorm2d(5)},
        IMAGES[..., :6, :6],
    ),
    "one_dimension": (
        lambda self, x: F.relu(self.bn(self.conv(x))),
        {"conv": nn.Conv1d(3, 5, 3), "bn": nn.BatchNorm1d(5)},
        IMAGES.flatten(2)[..., :20],
    ),
    "three_dimensions": (
        lambda self, x: F.relu(self.bn(self.conv(x))),
        {"conv": nn.Conv3d(3, 5, 3, groups=1), "bn": nn.BatchNorm3d(5)},
        IMAGES.reshape(6, 3, 4, 8, 8),
    ),
    "batch_norm_alone": (lambda self, x: self.bn(x) + 1, {"bn": nn.BatchNorm2d(3)}, IMAGES[..., :4, :4]),
    "identity_of_the_input": (lambda self, x: x.flatten(1), {}, IMAGES[..., :4, :4]),
}


EIGHT, FEWER = {"weight_bits": 8, "act_bits": 8}, {"weight_bits": 3, "act_bits": 6}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(name, scheme, id=f"{name}-{scheme['weight_bits']}", marks=pytest.mark.slow if is_slow else [])
        for index, name in enumerate(NETWORKS)
        for scheme, is_slow in ((EIGHT, index % 2), (FEWER, not index % 2))
    ],
)
def test_patterns(name, scheme, tmp_path):
    forward, modules, x = NETWORKS[name]
    folded = folded_network(randomize(Net(forward, **modules)), x, **scheme)
    exported(
        folded, tmp_path / "net.onnx", x, by_itself=0.5 if name == "attention" else 0.02
    )  # QLinearSoftmax truncates


def test_clipping_becomes_part_of_rounding(tmp_path):
    """ReLU6 below and above the range of the codes, and limits that lie on both sides of zero."""

    def forward(self, x):
        y = F.hardtanh(self.a(x), -0.7, 0.4)
        return F.relu6(self.b(y) * 3).flatten(1)

    model = randomize(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)))
    for act_bits in (8, 4):
        folded = folded_network(model, IMAGES * 3, weight_bits=8, act_bits=act_bits)
        for quantizer in activation_quantizers(folded).values():
            quantizer.scale.data.mul_(1.7)  # ranges beyond the limits
        for node in folded.graph.nodes:
            if "relu6" in node.name and node.op == "call_module":
                folded.get_submodule(node.target).scale.data.mul_(0.3)
        proto = exported(folded, tmp_path / "net.onnx", IMAGES * 3)
        makers = {name: node for node in proto.graph.node for name in node.output}
        clipped = [node for node in proto.graph.node if node.op_type == "Clip"]
        assert len(clipped) >= (1 if act_bits == 8 else 2)
        assert all(makers[node.input[0]].op_type == "QuantizeLinear" for node in clipped)


def test_wide_and_float_parts(tmp_path):
    scheme = {"weight_bits": 12, "act_bits": 10}
    folded = folded_network(randomize(flat_cnn()), IMAGES, **scheme, overrides=(LayerRule("6", off=True),))
    proto = exported(folded, tmp_path / "net.onnx", IMAGES)
    types = {tensor.data_type for tensor in proto.graph.initializer}
    assert {onnx.TensorProto.INT16, onnx.TensorProto.UINT16} <= types
    assert "6.weight" in initializers(proto)  # in floating point
    with pytest.raises(UserError, match="opset 18 has no integers of 9 to 16 bits.*use opset=21"):
        export_onnx(folded, IMAGES, tmp_path / "other.onnx", opset=18)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("scheme", [{"weight_bits": None}, {"act_bits": None}, {"per_channel": False}])
def test_one_side_in_floating_point_and_per_tensor(scheme, tmp_path):
    # ONNX Runtime quantizes float weights between quantized activations by itself (WeightBiasQuantization).
    by_itself = 1.0 if scheme.get("weight_bits", 8) is None else 0.02
    folded = folded_network(randomize(flat_cnn()), IMAGES, **scheme)
    exported(folded, tmp_path / "net.onnx", IMAGES, by_itself=by_itself)


def test_several_inputs_and_shared_layers(tmp_path):
    def forward(self, x, y):
        return self.conv(x) + self.conv(y), self.bn(self.other(x - y)).mean((2, 3))

    model = Net(nn.Module.forward, conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    model.__class__ = type("Two", (Net,), {"forward": forward})
    folded = folded_network(randomize(model), IMAGES, IMAGES.flip(0))
    exported(folded, tmp_path / "net.onnx", IMAGES, IMAGES.flip(0))


@pytest.mark.parametrize("name", small_or_slow("small mobilenet_v3", "mobilenet_v3_small"))
def test_torchvision_network_at_both_opsets(name, tmp_path):
    model = network(name).eval()
    images = torch.randn(4, 3, 32, 32)
    folded = folded_network(model, images, weight_bits=4, act_bits=8)
    for opset in (13, 21):
        proto = exported(folded, tmp_path / "net.onnx", images, opset=opset)
        session(tmp_path / "net.onnx", True, tmp_path / "optimized.onnx")
        found = kinds(onnx.load(tmp_path / "optimized.onnx"))
        layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
        assert sum(found[kind] for kind in INTEGER) == layers
        assert kinds(proto)["GlobalAveragePool"] == (2 if name.startswith("small") else 10)
    assert not [name for name in initializers(proto) if "parametrizations" in name]


def test_refused(tmp_path):
    path = tmp_path / "net.onnx"
    folded = folded_network(randomize(flat_cnn()), IMAGES)
    sim = quantize(flat_cnn(), IMAGES, QuantScheme())
    grouped = Net(
        lambda self, x: self.bn(self.conv(x)), conv=nn.ConvTranspose2d(4, 4, 3, groups=2), bn=nn.BatchNorm2d(4)
    )
    x = torch.randn(3, 4, 6, 6)
    with pytest.raises(UserError, match="conv is a grouped transposed convolution.*per tensor"):
        export_onnx(folded_network(randomize(grouped), x), x, path)
    exported(folded_network(randomize(grouped), x, per_channel=False), path, x)
    path.unlink()
    with pytest.raises(UserError, match="opset=12: expected 13 to 23"):
        export_onnx(folded, IMAGES, path, opset=12)
    with pytest.raises(UserError, match="not folded yet"):
        export_onnx(sim, IMAGES, path)
    with pytest.raises(UserError, match="at least 2"):
        export_onnx(folded, IMAGES[:1], path)
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        export_onnx(folded, IMAGES, tmp_path / "file" / "net.onnx")
    assert not path.exists()


def test_what_onnx_cannot_express_is_named(tmp_path):
    model = Net(lambda self, x: torch.linalg.svdvals(self.conv(x)), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(UserError, match="cannot express it in ONNX.*linalg_svd"):
        export_onnx(folded_network(model, IMAGES), IMAGES, tmp_path / "net.onnx")


def test_biases_leave_room_for_the_sum(tmp_path):
    """Large biases of channels with tiny scales: what the target adds up stays within int32."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    randomize(model)
    with torch.no_grad():
        model[1].weight.fill_(1e-9)
        model[1].bias.copy_(torch.tensor([5.0, -5.0, 2.0, 1e-3]))
    sim = quantize(model, IMAGES, QuantScheme(weight_bits=8))
    calibrate(sim, [IMAGES], 1)
    folded, _ = fold_batch_norms(sim)
    report = quantize_biases(folded)
    assert report.rescaled
    layer = folded.get_submodule("0")
    codes = layer.parametrizations.weight.original.double().flatten(1).abs().sum(1) * 255
    assert ((layer.parametrizations.bias.original.double().abs() + codes) < 2**31).all()
    exported(folded, tmp_path / "net.onnx", IMAGES)


def test_equal_operations_with_grids_of_their_own(tmp_path):
    """The exporter keeps one of them; each reader still gets its own rounding."""

    def forward(self, x):
        y = self.conv(x)
        return F.relu6(y).mean((2, 3)) + (F.relu6(y) * 2).amax((2, 3)) + torch.tanh(y * 1.0).sum((2, 3))

    model = randomize(Net(forward, conv=nn.Conv2d(3, 4, 3)))
    for overrides in ((), (LayerRule("relu6_1", off=True),), (LayerRule("relu6", act_bits=2),)):
        folded = folded_network(model, IMAGES, weight_bits=8, act_bits=6, overrides=overrides)
        for name, quantizer in activation_quantizers(folded).items():
            if name.endswith("relu6_1"):
                quantizer.scale.data.mul_(0.4)
        exported(folded, tmp_path / "net.onnx", IMAGES)


def test_names_that_collide(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stem_scale, self.output = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.flatten_on_grid = nn.Linear(4 * 14 * 14, 5)

        def forward(self, output, output_codes):
            y = self.output(self.stem_scale(self.stem(output)) * 2)
            return torch.softmax(self.flatten_on_grid(torch.flatten(y, 1)), 1) + output_codes.mean((1, 2))[:, :1]

    inputs = IMAGES, IMAGES.flip(0)
    folded = folded_network(randomize(Named()), *inputs)
    proto = exported(folded, tmp_path / "net.onnx", *inputs, by_itself=1.0)  # QLinearSoftmax truncates
    assert [item.name for item in proto.graph.input] == ["output", "output_codes"]


@pytest.mark.parametrize("padding", [0, 1])
def test_average_pooling_that_rounds_up(padding, tmp_path):
    pool = nn.AvgPool2d(3, 2, padding=padding, ceil_mode=True)
    folded = folded_network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), pool), IMAGES)
    exported(folded, tmp_path / "net.onnx", IMAGES)


def test_a_layer_called_twice_runs_in_our_session(tmp_path):
    model = Net(lambda self, x: self.conv(F.relu(self.conv(x))), conv=nn.Conv2d(3, 3, 3, padding=1))
    exported(folded_network(randomize(model), IMAGES, weight_bits=8), tmp_path / "net.onnx", IMAGES)
    twice = Net(lambda self, x: torch.cat([self.conv(x), self.conv(x.flip(3))], 1), conv=nn.Conv2d(3, 6, 3))
    folded = folded_network(randomize(twice), IMAGES, weight_bits=8)
    export_onnx(folded, IMAGES, tmp_path / "net.onnx")
    with torch.no_grad():
        wanted = integer_simulation(folded)(IMAGES)
    np.testing.assert_array_equal(outputs(tmp_path / "net.onnx", IMAGES, optimize=True)[0], wanted.numpy())


def test_elementwise_maximum_at_an_old_opset(tmp_path):
    model = Net(
        lambda self, x: torch.maximum(self.a(x), self.b(x)).flatten(1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)
    )
    exported(folded_network(randomize(model), IMAGES), tmp_path / "net.onnx", IMAGES, opset=13)


def test_mistakes_of_a_caller(tmp_path):
    folded = folded_network(randomize(flat_cnn()), IMAGES)
    for example in (IMAGES.numpy(), None, {"x": IMAGES}):
        with pytest.raises(UserError, match="example_input: expected a batch"):
            export_onnx(folded, example, tmp_path / "net.onnx")
    with pytest.raises(UserError, match=r"the network cannot take \[6, 5, 16, 16\]"):
        export_onnx(folded, torch.randn(6, 5, 16, 16), tmp_path / "net.onnx")
    for path in ("", "."):
        with pytest.raises(UserError, match="no path of a file|cannot be written"):
            export_onnx(folded, IMAGES, path)
    with pytest.raises(UserError, match="opset='21'"):
        export_onnx(folded, IMAGES, tmp_path / "net.onnx", opset="21")
    uncalibrated, _ = fold_batch_norms(quantize(flat_cnn(), IMAGES, QuantScheme()))
    with pytest.raises(UserError, match="has no range yet; run calibrate"):
        export_onnx(uncalibrated, IMAGES, tmp_path / "net.onnx")
