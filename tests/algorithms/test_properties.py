"""Random small networks: what must hold of every one of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnre_exp import QuantScheme, bypassed, calibrate, fold_batch_norms, quantize, reestimate_bn_stats
from scripts.bench.zoo.foldable import foldable_bns
from tests.networks import BN, CONV, TRANSPOSED, randomize, unequal_batches

CHANNELS = 4
LAYERS = ("conv", "grouped", "depthwise", "transposed", "pointwise")
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid")
POOLING = ("max", "average")


@dataclass(frozen=True)
class Step:
    """One operation: its kind, the tensors that it reads (indices of earlier ones), and the module of an earlier step
    that it calls instead of a new one."""

    kind: str
    reads: tuple[int, int]
    reuse: int


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, tuple[Step, ...]]:
    """Dimensions of the image, and the steps. Sequences of layer → BN → activation are as likely as anything else."""
    dim, steps = draw(st.sampled_from([1, 2, 3])), []
    kinds = st.sampled_from([*LAYERS, *["bn"] * 4, *ACTIVATIONS[:4], "add", "concat", "dropout", *POOLING])
    for index in range(draw(st.integers(2, 9))):
        latest = st.integers(max(0, index - 1), index)  # mostly a chain, with second consumers
        reads = (index if draw(st.integers(0, 3)) else draw(latest), draw(st.integers(0, index)))
        steps.append(Step(draw(kinds), reads, draw(st.integers(0, 3 * index + 3))))
    return dim, tuple(steps)


class Planned(nn.Module):
    """The network of a plan. Every tensor keeps its shape, and those that no step reads are summed up at the end."""

    def __init__(self, dim: int, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.dim, self.steps, self.names = dim, steps, []
        for index, step in enumerate(steps):
            same = [name for name, earlier in zip(self.names, steps) if earlier.kind == step.kind and name]
            name = same[step.reuse] if step.reuse < len(same) else f"{step.kind}{index}"
            if name == f"{step.kind}{index}" and (module := self._module(step.kind)) is not None:
                self.add_module(name, module)
            self.names.append(name if hasattr(self, name) else "")

    def _module(self, kind: str) -> nn.Module | None:
        conv, three = CONV[self.dim], {"kernel_size": 3, "padding": 1}
        made = {
            "conv": lambda: conv(CHANNELS, CHANNELS, **three),
            "grouped": lambda: conv(CHANNELS, CHANNELS, groups=2, bias=False, **three),
            "depthwise": lambda: conv(CHANNELS, CHANNELS, groups=CHANNELS, **three),
            "transposed": lambda: TRANSPOSED[self.dim](CHANNELS, CHANNELS, groups=2, **three),
            "pointwise": lambda: conv(CHANNELS, CHANNELS, 1, groups=CHANNELS),
            "concat": lambda: conv(2 * CHANNELS, CHANNELS, 1),
            "bn": lambda: BN[self.dim](CHANNELS),
            "dropout": lambda: nn.Dropout(0.3),
        }
        return made[kind]() if kind in made else None

    def forward(self, x: Tensor) -> Tensor:
        tensors, unread = [x], {0}
        for step, name in zip(self.steps, self.names):
            a, b = step.reads
            unread -= {a, b} if step.kind in ("add", "concat") else {a}
            tensors.append(self._result(step.kind, name, tensors[a], tensors[b]))
            unread.add(len(tensors) - 1)
        return sum(tensors[i] for i in sorted(unread))

    def _result(self, kind: str, name: str, a: Tensor, b: Tensor) -> Tensor:
        if kind == "add":
            return a + b
        if kind == "concat":
            return getattr(self, name)(torch.cat([a, b], 1))
        if kind in POOLING:
            pool = {"max": "max", "average": "avg"}[kind]
            return getattr(F, f"{pool}_pool{self.dim}d")(a, 3, stride=1, padding=1)
        return getattr(self, name)(a) if name else getattr(F, kind)(a)


def batches_of(dim: int) -> list[Tensor]:
    return unequal_batches((CHANNELS, *(5,) * dim), sizes=(4, 2, 5))


fewer = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def folding_keeps_the_function_and_accounts_for_every_bn(plan: tuple[int, tuple[Step, ...]]) -> None:
    model = randomize(Planned(*plan)).double().eval()
    x = batches_of(plan[0])[0].double()
    sim = quantize(model, x, QuantScheme(weight_bits=4, act_bits=8))
    folded, report = fold_batch_norms(sim)
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        expected = sim(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    taken, kept = [bn for _, bn in report.folded], [bn for bn, _ in report.kept]
    assert sorted({*taken, *kept}) == sorted(name for name, m in model.named_modules() if isinstance(m, BN[plan[0]]))
    assert not set(taken) & set(kept) and all(reason for _, reason in report.kept)
    possible = foldable_bns(model, x)
    assert set(taken) == possible.after | possible.before


def only_bn_statistics_change_and_undo_restores_them(plan: tuple[int, tuple[Step, ...]]) -> None:
    batches = batches_of(plan[0])
    sim = quantize(randomize(Planned(*plan)), batches[0], QuantScheme(weight_bits=4, act_bits=8)).train()
    calibrate(sim, batches, 3)
    if not any(isinstance(module, BN[plan[0]]) for module in sim.modules()):
        return
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    handle = reestimate_bn_stats(sim, batches, 3)
    changed = {key for key, value in sim.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in changed} <= {"running_mean", "running_var"}
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in sim.state_dict().items())
    assert all(module.training for module in sim.modules())


def sixteen_bits_are_close_to_fp32(plan: tuple[int, tuple[Step, ...]]) -> None:
    batches = batches_of(plan[0])
    model = randomize(Planned(*plan)).eval()
    scheme = QuantScheme(weight_bits=16, act_bits=16, weight_range="minmax", act_range="minmax")
    sim = quantize(copy.deepcopy(model), batches[0], scheme)
    calibrate(sim, batches, 3)
    with torch.no_grad():
        for x in batches:
            expected = model(x)
            torch.testing.assert_close(sim(x), expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


PROPERTIES = [
    folding_keeps_the_function_and_accounts_for_every_bn,
    only_bn_statistics_change_and_undo_restores_them,
    sixteen_bits_are_close_to_fp32,
]


@pytest.mark.parametrize("holds", PROPERTIES)
def test_of_some_networks(holds):
    fewer(given(plans())(holds))()


@pytest.mark.slow
@pytest.mark.parametrize("holds", PROPERTIES)
def test_of_many_networks(holds):
    many(given(plans())(holds))()
