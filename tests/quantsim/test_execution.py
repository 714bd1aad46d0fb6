"""The executed code of a simulation computes what its graph says: values, gradients, what hooks see."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from bnre_exp import QuantScheme, calibrate, quantize
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from bnre_exp.quantsim.sim import bypassed
from tests.networks import Net, randomize, unequal_batches

BATCHES = unequal_batches((3, 8, 8))


class Branches(nn.Module):
    """ReLU and ReLU6 behind BN, conv and a sum; a value with two readers; a ReLU of a view; a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.second, self.bn2, self.relu2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.third, self.relu3, self.relu4 = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.ReLU()
        self.last = nn.Linear(8 * 64, 5)

    def forward(self, x):
        x = self.relu1(self.bn1(self.first(x)))
        y = self.relu2(self.bn2(self.second(x)))
        z = self.third(y)
        z = self.relu3(z + x) + F.relu(z)
        return self.last(self.relu4(z.flatten(1)))


def made(scheme: QuantScheme) -> fx.GraphModule:
    sim = quantize(randomize(Branches()).eval(), BATCHES[0], scheme)
    if scheme.act_bits is not None:
        calibrate(sim, BATCHES, 4)
    return sim


SCHEMES = {
    "w4a8": QuantScheme(4, 8),
    "w4a8 fixed": QuantScheme(4, 8, range_learning=False),
    "a3": QuantScheme(None, 3),
    "minmax": QuantScheme(4, 8, act_range="minmax"),
    "weights": QuantScheme(3, None),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("training", [False, True])
def test_code_and_graph_compute_the_same_bit_for_bit(scheme, training):
    sim = made(scheme)
    assert "after" not in sim.code and all(node.target != "after" for node in sim.graph.nodes)
    for batch in BATCHES:
        sim.train(training)
        state = copy.deepcopy(sim.state_dict())
        with torch.no_grad():
            found = sim(batch.clone())
            sim.load_state_dict(state)
            expected = fx.Interpreter(sim).run(batch)
            sim.load_state_dict(state)
        assert torch.equal(found, expected)
        assert torch.equal(sim(batch).detach(), expected)  # with gradients, where nothing is overwritten
        sim.load_state_dict(state)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_code_and_graph_have_the_same_gradients(scheme):
    sim = made(scheme).double().train()
    other = copy.deepcopy(sim)
    batch = BATCHES[2].double()
    sim(batch).square().sum().backward()
    fx.Interpreter(other).run(batch).square().sum().backward()
    for (name, ours), theirs in zip(sim.named_parameters(), other.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["bn1", "relu1", "third", "relu3", "act_quantizers.relu1", "act_quantizers.relu2"])
def test_a_hook_sees_and_keeps_what_its_module_computes(name):
    sim, seen = made(SCHEMES["w4a8"]), []
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.op == "call_module":
                values[node.target] = value.clone()
            return value

    with torch.no_grad():
        expected = Recorder(sim).run(BATCHES[0])
        handle = sim.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output))
        assert torch.equal(sim(BATCHES[0]), expected)
        assert len(seen) == 1 and torch.equal(seen[0], values[name])
        handle.remove()
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert torch.equal(sim(BATCHES[0]), expected)


@pytest.mark.parametrize("name", ["bn1", "third", "relu1"])
@pytest.mark.parametrize("scheme", ["w4a8", "weights"])
def test_backward_hooks_work(name, scheme):
    sim, seen = made(SCHEMES[scheme]).train(), []
    sim.get_submodule(name).register_full_backward_hook(lambda _, into, outof: seen.append(outof[0]))
    sim(BATCHES[0]).sum().backward()
    assert len(seen) == 1 and seen[0].shape[:2] == (8, 8)


def test_inputs_of_the_network_and_values_with_other_readers_are_left_alone():
    sim, batch = made(SCHEMES["w4a8"]), BATCHES[0].clone()
    with torch.no_grad():
        first, second = sim(batch), sim(batch)
    assert torch.equal(batch, BATCHES[0]) and torch.equal(first, second)


def test_states_of_quantizers_count_at_every_call():
    sim = made(SCHEMES["w4a8"])
    with torch.no_grad(), bypassed(sim, weights=True):
        assert torch.equal(sim(BATCHES[0]), fx.Interpreter(sim).run(BATCHES[0]))
    for quantizer in sim.modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.has_range = False
    with pytest.raises(ValueError, match="has no range yet"):
        sim(BATCHES[0])


def test_a_module_that_is_replaced_is_called():
    sim = made(SCHEMES["w4a8"])
    sim.relu1 = nn.LeakyReLU(0.5)
    sim.bn1 = nn.Identity()
    with torch.no_grad():
        assert torch.equal(sim(BATCHES[0]), fx.Interpreter(sim).run(BATCHES[0]))


def test_a_copy_computes_with_its_own_modules():
    sim = made(SCHEMES["w4a8"])
    twin = copy.deepcopy(sim)
    with torch.no_grad():
        before = sim(BATCHES[0])
        twin.act_quantizers.relu1.scale.mul_(3)
        assert torch.equal(sim(BATCHES[0]), before) and not torch.equal(twin(BATCHES[0]), before)


class Gained(nn.BatchNorm2d):
    """A batch norm with a further argument."""

    def forward(self, x, gain=1.0):
        return super().forward(x) * gain


class Skip(nn.SiLU):
    """Hands on what it gets."""

    def forward(self, x):
        return x


class SigmoidConv(nn.Conv2d):
    """Its result is needed for its gradient."""

    def forward(self, x):
        return super().forward(x).sigmoid()


class Twists(nn.Module):
    """What networks do between a batch norm and what follows it, and classes that are not quite torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.gained, self.skip, self.gate = Gained(8), Skip(), SigmoidConv(8, 8, 1)
        self.shared, self.relu1, self.relu2, self.relu3 = nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(), nn.ReLU6()
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        y = self.bn(input=self.conv(x))
        b, c, _, _ = y.shape
        y = self.relu(input=y)
        first = self.shared(y)
        second = self.shared(y + 1)
        y = self.relu2(second) + self.relu1(first)
        z = self.gained(y, 0.5)
        y = self.skip(z) + z
        y = self.relu3(self.gate(y)) + y
        return self.last(y.mean(dim=(2, 3)).view(b, c))


@pytest.mark.parametrize("training", [False, True])
def test_what_networks_do_in_between_is_done(training):
    sim = quantize(randomize(Twists()).eval(), BATCHES[0], SCHEMES["w4a8"])
    calibrate(sim, BATCHES, 4)
    sim.double().train(training)
    for has_gradients in (False, True):
        one, other = copy.deepcopy(sim), copy.deepcopy(sim)
        with torch.set_grad_enabled(has_gradients):
            found, expected = one(BATCHES[1].double()), fx.Interpreter(other).run(BATCHES[1].double())
        assert torch.equal(found.detach(), expected.detach())
        torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
        if has_gradients:
            found.square().sum().backward(), expected.square().sum().backward()
            for (name, ours), theirs in zip(one.named_parameters(), other.parameters()):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-7, msg=name)


def test_a_module_that_hands_on_what_it_gets_may_replace_one_that_does_not():
    sim = made(SCHEMES["w4a8"])
    sim.relu2 = nn.Identity()
    sim.relu3 = nn.Dropout().eval()
    with torch.no_grad():
        assert torch.equal(sim(BATCHES[0]), fx.Interpreter(sim).run(BATCHES[0]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_of_one_pixel_are_computed_bit_for_bit_as_the_graph_says(memory_format):
    """Their strides do not say how they lie in memory; kernels that follow choose by them, and round otherwise."""

    def forward(m, x):
        y = m.relu(m.conv(F.adaptive_avg_pool2d(x, 1)))
        y = m.silu(m.second(y))
        return m.last(torch.cat([x, F.interpolate(y, size=x.shape[2:], mode="bilinear")], 1))

    parts = {"conv": nn.Conv2d(8, 16, 1), "relu": nn.ReLU(), "second": nn.Conv2d(16, 16, 1), "silu": nn.SiLU()}
    model = randomize(Net(forward, **parts, last=nn.Conv2d(24, 4, 3))).eval().to(memory_format=memory_format)
    x = torch.randn(3, 8, 9, 9).to(memory_format=memory_format)
    sim = quantize(model, x, QuantScheme(4, 8))
    calibrate(sim, [x], 1)
    plain = fx.GraphModule(sim, sim.graph)
    names = [str(node.target) for node in sim.graph.nodes if "act_quantizers" in str(node.target)]
    seen: list[list[tuple[int, ...]]] = [[], []]
    with torch.no_grad():
        for strides, network in zip(seen, (sim, plain)):
            assert torch.equal(network(x), plain(x))
            following = [sim.conv, sim.second, sim.last]
            handles = [m.register_forward_pre_hook(lambda _, a, s=strides: s.append(a[0].stride())) for m in following]
            network(x)
            for handle in handles:
                handle.remove()
    assert names and seen[0] == seen[1]
