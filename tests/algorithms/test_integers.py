"""The network on integers: against integer arithmetic written out, and against ONNX Runtime's integer kernels."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnre_exp import (
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    export_onnx,
    fold_batch_norms,
    integer_simulation,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    save_folded,
)
from bnre_exp.onnx_io.session import feeds, open_session
from tests.export.saving import folded_network
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network, small_or_slow

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(network: nn.Module, *x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(*x)


def through_onnx_runtime(folded, path, x: Tensor) -> Tensor:
    export_onnx(folded, x, path)
    session = open_session(onnx.load(path))
    return torch.from_numpy(session.run(None, feeds(session, x))[0])


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (3, 5)])
def test_layer_by_layer_in_int64(weight_bits, act_bits):
    """Each conv with its ReLU and quantizer, from the codes that it got, in numpy's integers."""
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=weight_bits, act_bits=act_bits)
    network, seen = integer_simulation(folded), []
    for node in network.graph.nodes:
        if str(node.target).endswith("_in_integers"):  # conv, quantizer, conv, quantizer, ...
            network.get_submodule(node.target).register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    run(network, IMAGES)
    convs = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    grids = [
        (quantizer.scale.detach().numpy(), int(quantizer.zero_point.round()))
        for quantizer in activation_quantizers(folded).values()
    ]
    assert len(convs) == 3 and len(seen) == 8
    for index, conv in enumerate(convs):
        (scale_in, _), (scale_out, zero_out) = grids[index], grids[index + 1]
        weight, bias = conv.parametrizations.weight, conv.parametrizations.bias
        codes = np.rint(seen[2 * index][0].numpy() / scale_in)
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        sums = F.conv2d(torch.from_numpy(codes).double(), weight.original.double(), bias.original.double(), *how)
        assert torch.equal(sums, sums.round())
        multiplier = scale_in * weight[0].scale.numpy() / scale_out
        wanted = np.rint(sums.numpy().astype(np.float32) * multiplier[:, None, None])
        wanted = np.clip(wanted + zero_out, 0, 2**act_bits - 1) - zero_out
        np.testing.assert_array_equal(np.rint(seen[2 * index + 1][1].numpy() / scale_out), wanted)


def plain(self, x):
    return self.head(torch.flatten(F.relu6(self.bn(self.conv(x))), 1))


def limited(self, x):
    y = F.hardtanh(self.bn(self.conv(x)), -0.3, max_val=0.7)
    return self.head(torch.flatten(self.act(y), 1))


def without_requantization(self, x):
    return self.head(torch.flatten(torch.tanh(self.bn(self.conv(x))), 1))


NETWORKS = {
    "flat": lambda: flat_cnn(),
    "relu6": lambda: Net(
        plain, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), head=nn.Linear(8 * 256, 10)
    ),
    "hardtanh": lambda: Net(
        limited, conv=nn.Conv2d(3, 9, 3, groups=3, stride=2, padding=1), bn=nn.BatchNorm2d(9), act=nn.Hardtanh(0, 0.5),
        head=nn.Linear(9 * 64, 10),
    ),
}  # fmt: skip


BITS = [(8, 8), (4, 4), (3, 8)]
ONCE_EACH = {"flat": (3, 8), "relu6": (4, 4), "hardtanh": (8, 8)}


@pytest.mark.parametrize(
    ("name", "weight_bits", "act_bits"),
    [
        pytest.param(name, *bits, marks=[] if bits == ONCE_EACH[name] else pytest.mark.slow)
        for name in NETWORKS
        for bits in BITS
    ],
)
def test_equals_onnx_runtime(name, weight_bits, act_bits, tmp_path):
    torch.manual_seed(0)
    folded = folded_network(randomize(NETWORKS[name]()), IMAGES, weight_bits=weight_bits, act_bits=act_bits)
    x = torch.randn(64, 3, 16, 16)
    assert torch.equal(run(integer_simulation(folded), x), through_onnx_runtime(folded, tmp_path / "net.onnx", x))


@pytest.mark.parametrize(
    "name", small_or_slow("small googlenet", "small shufflenet_v2", "googlenet", "shufflenet_v2_x0_5")
)
def test_real_networks_equal_onnx_runtime(name, tmp_path):
    """Networks without additions, which ONNX Runtime's kernels round in their own ways."""
    torch.manual_seed(0)
    model = randomize(network(name))
    batches = [torch.randn(8, 3, 64, 64) for _ in range(3)]
    sim = quantize(model, batches[0], QuantScheme(weight_bits=8, act_bits=8))
    with bypassed(sim):
        reestimate_bn_stats(sim, batches, 3)
    calibrate(sim, batches, 3)
    folded, _ = fold_batch_norms(sim)
    quantize_biases(folded)
    found = through_onnx_runtime(folded, tmp_path / "net.onnx", batches[0])
    assert torch.equal(run(integer_simulation(folded), batches[0]), found)


def test_the_batch_size_does_not_matter():
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4)
    network = integer_simulation(folded)
    assert torch.equal(run(network, IMAGES), torch.cat([run(network, x[None]) for x in IMAGES]))


def test_folded_stays_as_it_was():
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4)
    state, code, before = copy.deepcopy(folded.state_dict()), folded.code, run(folded, IMAGES)
    modes = [module.training for module in folded.modules()]
    network = integer_simulation(folded)
    after = run(network, IMAGES)
    network.double().train()
    assert folded.code == code and torch.equal(run(folded, IMAGES), before)
    assert all(torch.equal(value, state[name]) for name, value in folded.state_dict().items())
    assert [module.training for module in folded.modules()] == modes
    network = integer_simulation(folded)
    with bypassed(folded):  # what is done to one is not done to the other
        assert torch.equal(run(network, IMAGES), after)


def test_no_weight_is_held_twice():
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4)
    sizes = [sum(x.numel() for x in net.state_dict().values()) for net in (folded, integer_simulation(folded))]
    assert sizes[1] < 1.2 * sizes[0]


def test_in_float64_as_in_float32():
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=8)
    wanted = run(integer_simulation(folded), IMAGES)
    found = run(integer_simulation(folded.double()), IMAGES.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), wanted, rtol=1e-6, atol=0)


def test_half_precision_stays():
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=8).bfloat16()
    assert torch.equal(run(integer_simulation(folded), IMAGES.bfloat16()), run(folded, IMAGES.bfloat16()))


def upsampled(self, x):
    return self.up(F.relu(self.conv(x)), [33, 33])


def limited_by_size(self, x):
    return self.up(F.hardtanh(self.conv(x), -0.5, x.shape[1] / 4))


@pytest.mark.parametrize("forward", [upsampled, limited_by_size])
def test_other_arguments_are_handed_on(forward):
    net = Net(forward, conv=nn.Conv2d(3, 6, 3, padding=1), up=nn.ConvTranspose2d(6, 4, 3, stride=2))
    folded = folded_network(randomize(net), IMAGES, weight_bits=4)
    wanted, found = run(folded, IMAGES), run(integer_simulation(folded), IMAGES)
    assert found.shape == wanted.shape and not torch.isclose(found, wanted, rtol=1e-5, atol=1e-6).logical_not().any()


def test_hooks_see_what_they_are_made_for():
    net = randomize(Net(lambda m, x: m.two(F.relu(m.one(x))), one=nn.Conv2d(3, 6, 3), two=nn.Conv2d(6, 4, 3)))
    net.one.register_forward_hook(lambda module, x, y: y.clamp(-1, 1))
    folded = folded_network(net, IMAGES, weight_bits=4)
    torch.testing.assert_close(run(integer_simulation(folded), IMAGES), run(folded, IMAGES), rtol=1e-5, atol=1e-6)
    quantizer = list(activation_quantizers(folded).values())[1]
    quantizer.register_forward_hook(lambda module, x, y: y * 0.5)
    torch.testing.assert_close(run(integer_simulation(folded), IMAGES), run(folded, IMAGES), rtol=1e-5, atol=1e-6)


def test_refused(tmp_path):
    for other in (flat_cnn(), quantize(flat_cnn(), IMAGES, QuantScheme(weight_bits=4))):
        with pytest.raises(UserError, match="integer_simulation: expected a network that fold_batch_norms"):
            integer_simulation(other)
    network = integer_simulation(folded_network(flat_cnn(), IMAGES, weight_bits=4))
    with pytest.raises(UserError, match=r"integer_simulation\(\) made of a folded network; give the folded network"):
        save_folded(network, tmp_path / "net")
    with pytest.raises(UserError, match="give the folded network"):
        export_onnx(network, IMAGES, tmp_path / "net.onnx")


@pytest.mark.parametrize("act_bits", [None, 16])
def test_what_is_not_in_integers_stays(act_bits):
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4, act_bits=act_bits)
    assert torch.equal(run(integer_simulation(folded), IMAGES), run(folded, IMAGES))


def test_layers_with_float_biases_stay():
    sim = quantize(randomize(flat_cnn()), IMAGES, QuantScheme(weight_bits=4, act_bits=8))
    calibrate(sim, [IMAGES], 1)
    folded, _ = fold_batch_norms(sim)
    assert torch.equal(run(integer_simulation(folded), IMAGES), run(folded, IMAGES))


def test_sums_that_are_not_requantized(tmp_path):
    """A layer before tanh: its output is the sum times the two scales."""
    net = Net(
        without_requantization, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), head=nn.Linear(8 * 256, 10)
    )
    folded = folded_network(randomize(net), IMAGES, weight_bits=4)
    wanted = run(folded.double(), IMAGES.double())
    found = run(integer_simulation(folded.float()), IMAGES)
    step = float(list(activation_quantizers(folded).values())[-1].scale.detach())
    assert float(((found - wanted) / step).abs().max()) < 1.01
    assert float(((found - wanted) / step).abs().mean()) < 0.01
