"""The part of a network that re-estimation computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, calibrate, quantize, reestimate_bn_stats
from bnre_exp.quantsim.tracing.network import up_to_batch_norms
from tests.networks import Net, randomize, unequal_batches

BATCHES = unequal_batches((3, 8, 8))


def network() -> nn.Module:
    """Two heads of which one ends in a batch norm, and a long way behind it."""
    model = Net(
        lambda m, x: (m.head(m.pool(y := m.relu(m.bn(m.conv(x)))).flatten(1)), m.other(m.pool(y))),
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(6, 4), other=nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Sigmoid(), nn.Flatten()),
    )  # fmt: skip
    return randomize(model).eval()


def test_only_what_leads_to_a_batch_norm_is_computed():
    sim = quantize(network(), BATCHES[0], QuantScheme(4, 8))
    calibrate(sim, BATCHES, 4)
    part = up_to_batch_norms(sim)
    called = {str(node.target) for node in part.graph.nodes if node.op in ("call_module", "get_attr")}
    assert {"conv", "bn", "pool", "other.0", "other.1"} <= called and not {"head", "other.2"} & called
    assert part(BATCHES[0]) is None and part.bn is sim.bn


@pytest.mark.parametrize("method", ["batch_average", "pooled"])
def test_statistics_are_those_of_the_whole_network(method):
    sim = quantize(network(), BATCHES[0], QuantScheme(4, 8))
    calibrate(sim, BATCHES, 4)
    with reestimate_bn_stats(sim, BATCHES, 6, method=method):
        part = {name: value.clone() for name, value in sim.state_dict().items()}
    with reestimate_bn_stats(sim, BATCHES, 6, lambda model, x: model(x), method=method):
        torch.testing.assert_close(part, dict(sim.state_dict()), rtol=0, atol=0)


def test_hooks_behind_the_last_batch_norm_are_called():
    sim, seen = quantize(network(), BATCHES[0], QuantScheme(4, None)), []
    with reestimate_bn_stats(sim, BATCHES, 2):
        assert not seen
    handle = sim.head.register_forward_hook(lambda *_: seen.append(1))
    with reestimate_bn_stats(sim, BATCHES, 2):
        assert len(seen) == 2
    handle.remove()
    sim.register_forward_hook(lambda *_: seen.append(1))
    with reestimate_bn_stats(sim, BATCHES, 2):
        assert len(seen) == 4


class Head(nn.Module):
    """A part that is kept whole, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(self.linear(x)) if float(x.sum()) != 0.25 else x


@pytest.mark.parametrize("method", ["batch_average", "pooled"])
def test_batch_norms_within_parts_that_are_kept_whole_are_reached(method):
    model = randomize(
        Net(
            lambda m, x: m.head(m.pool(m.bn(m.conv(x))).flatten(1)),
            conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), pool=nn.AdaptiveAvgPool2d(1), head=Head(),
        )
    ).eval()  # fmt: skip
    sim = quantize(model, BATCHES[0], QuantScheme(4, None), leaf_modules=["head"])
    handle = reestimate_bn_stats(sim, BATCHES, 6, method=method)
    assert not handle.unreached
    found = {name: value.clone() for name, value in sim.state_dict().items() if "running" in name}
    handle.remove()
    reestimate_bn_stats(sim, BATCHES, 6, lambda model, x: model(x), method=method)
    torch.testing.assert_close(found, {name: sim.state_dict()[name] for name in found}, rtol=0, atol=0)


def test_a_mask_makes_the_number_of_values_depend_on_more_than_shapes():
    model = Net(
        lambda m, x: m.bn(m.first(x.flatten(1))[x.mean(dim=(1, 2, 3)) > 0]),
        first=nn.Linear(192, 6), bn=nn.BatchNorm1d(6),
    )  # fmt: skip
    torch.manual_seed(1)
    sim = quantize(randomize(model).eval(), torch.rand(4, 3, 8, 8), QuantScheme(4, None))
    batches = [torch.randn(16, 3, 8, 8) + shift for shift in (-0.05, 0.05, 0.3)]
    with reestimate_bn_stats(sim, batches, 3, method="pooled"):
        values = torch.cat([sim.first(x.flatten(1))[x.mean(dim=(1, 2, 3)) > 0] for x in batches]).detach()
        torch.testing.assert_close(sim.bn.running_mean, values.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sim.bn.running_var, values.var(0), rtol=1e-4, atol=1e-5)
