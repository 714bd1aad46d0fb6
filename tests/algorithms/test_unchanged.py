"""Re-estimation changes statistics only, also of networks whose own modules move as batches go through them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.ao.quantization as tq
from torch import nn

from bnre_exp import UserError, reestimate_bn_stats
from bnre_exp.algorithms.unchanged import unchanged

BATCHES = [torch.randn(size, 3, 12, 12, generator=torch.Generator().manual_seed(size)) * 3 for size in (8, 5, 11)]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def torch_qat(batches: int = 3) -> nn.Module:
    """Two convolutions that torch.ao quantizes together with their batch norms, with ranges of some batches."""
    first, second = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    model = tq.fuse_modules_qat(nn.Sequential(*first, *second).train(), [["0", "1"], ["3", "4"]])
    model.qconfig = tq.get_default_qat_qconfig("x86")
    tq.prepare_qat(model, inplace=True)
    for _ in range(batches):
        model(torch.randn(8, 3, 12, 12))
    return model


@pytest.mark.parametrize("method", ["batch_average", "pooled", "ema"])
def test_observers_of_torch_ao_do_not_move(method):
    model = torch_qat()
    assert type(model[0]).__module__.startswith("torch.ao.nn.intrinsic.qat")
    before = state_of(model)
    handle = reestimate_bn_stats(model, BATCHES, 3, method=method)
    assert changed(model, before) == {f"{i}.bn.running_{kind}" for i in (0, 3) for kind in ("mean", "var")}
    handle.remove()
    assert changed(model, before) == set()
    assert all(bool(m.observer_enabled) for m in model.modules() if hasattr(m, "observer_enabled"))
    model(BATCHES[0])
    assert "0.activation_post_process.scale" in changed(model, before)  # they are at work again


def test_statistics_are_those_of_the_frozen_ranges():
    model = torch_qat()
    frozen = copy.deepcopy(model).apply(tq.disable_observer)
    for each in (model, frozen):
        reestimate_bn_stats(each, BATCHES, 3)
    for i in (0, 3):
        assert torch.equal(model[i].bn.running_var, frozen[i].bn.running_var)


def test_observers_that_have_seen_nothing_are_an_error():
    model = torch_qat(batches=0)
    before = state_of(model)
    with pytest.raises(UserError, match="weight_fake_quant .*has seen no data yet"):
        reestimate_bn_stats(model, BATCHES, 3)
    assert changed(model, before) == set()


def test_ranges_of_weights_that_hold_the_old_statistics_are_named(caplog):
    model = torch_qat()
    with torch.no_grad():
        model[0].bn.running_var.mul_(16)
    bns = [model[0].bn, model[3].bn]
    old = [bn.running_var.clone() for bn in bns]
    reestimate_bn_stats(model, BATCHES, 3)
    growth = max(float((var / bn.running_var).sqrt().max()) for var, bn in zip(old, bns))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("0, 3: their weights") and f"up to {growth:.3g} times as large" in message


class Moving(nn.Module):
    """A conv and BN around state that every call moves, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.low = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full((3,), torch.nan), persistent=False)
        self.register_buffer("cache", torch.zeros(0))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean.nan_to_num() + 0.1 * x.mean((0, 2, 3))  # another tensor
        self.low.data.copy_(x.min())
        self.cache = torch.arange(len(x))
        return self.bn(self.conv(x))


def test_whatever_moves_is_put_back_and_named(caplog):
    model = Moving().eval()
    before, mean = state_of(model), model.mean
    del before["cache"]
    with caplog.at_level(logging.WARNING):
        handle = reestimate_bn_stats(model, BATCHES, 3)
    model.cache = torch.zeros(0)
    moved = changed(model, {**before, "cache": model.cache})
    assert moved == {"bn.running_mean", "bn.running_var"}
    assert model.mean is mean and bool(mean.isnan().all())
    assert caplog.records[0].getMessage().startswith("low, calls, mean changed in evaluation mode")
    handle.remove()
    assert changed(model, {**before, "cache": model.cache}) == set()


def test_caches_are_left_and_an_error_puts_back_too():
    model = Moving().eval()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="Kernel size"), unchanged(model):
        model(BATCHES[0])
        model(torch.zeros(2, 3, 1, 1))
    assert len(model.cache) == 2
    assert changed(model, {**before, "cache": model.cache}) == set()


def test_nothing_is_said_of_a_network_that_stays_as_it_is(caplog):
    reestimate_bn_stats(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), BATCHES, 3)
    assert not caplog.records


def test_lazy_layers_are_no_obstacle():
    """They get their shape from the first batch, as in any forward pass."""
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))
    assert reestimate_bn_stats(model, [torch.randn(4, 3, 5, 5)], 1).num_batches == 1
