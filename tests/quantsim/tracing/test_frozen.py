"""Batch norms that their user froze stay frozen: in the simulation, in training, and in what is reported."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp import (
    QuantScheme,
    UserError,
    calibrate,
    fold_batch_norms,
    quantize,
    reestimate_bn_stats,
    sim_report,
    train,
)
from bnre_exp.quantsim.tracing.frozen import frozen_modules, train_mode
from tests.networks import Net, flat_cnn, randomize

X = torch.randn(4, 3, 16, 16)
DATA = [(X, torch.arange(4)), (X * 2, torch.arange(4))]
FLOAT = QuantScheme(act_bits=None)


class NormEval(nn.Sequential):
    """As mmcv's backbones with norm_eval."""

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class NormEvalAlone(nn.Sequential):
    """As NormEval; its ``train`` returns nothing, as many do."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self[1].eval()


def one_frozen() -> tuple[nn.Module, set[str]]:
    model = randomize(flat_cnn()).train()
    model[4].eval()
    return model, {"4"}


def norm_eval() -> tuple[nn.Module, set[str]]:
    return NormEval(*randomize(flat_cnn())).train(), {"1", "4", "7"}


def norm_eval_in_evaluation() -> tuple[nn.Module, set[str]]:
    return NormEval(*randomize(flat_cnn())).eval(), {"1", "4", "7"}


def norm_eval_that_returns_nothing() -> tuple[nn.Module, set[str]]:
    model = NormEvalAlone(*randomize(flat_cnn()))
    model.train()
    return model, {"1"}


def trained_before() -> tuple[nn.Module, set[str]]:
    model, frozen = one_frozen()
    train(model, DATA, 1, lr=1e-4)
    assert not model.training
    return model, frozen


def nothing_frozen() -> tuple[nn.Module, set[str]]:
    return randomize(flat_cnn()).eval(), set()


CASES = [one_frozen, norm_eval, norm_eval_in_evaluation, norm_eval_that_returns_nothing, trained_before, nothing_frozen]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    bns = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {name: torch.cat([bn.running_mean, bn.running_var]).clone() for name, bn in bns.items()}


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, values in statistics(model).items() if not torch.equal(values, before[name])}


@pytest.mark.parametrize("case", CASES)
def test_frozen_stays_frozen_through_quantize_and_training_and_is_reported(case):
    model, frozen = case()
    modes = {name: m.training for name, m in model.named_modules()}
    sim = quantize(model, X, FLOAT)
    assert set(sim_report(sim).frozen_bns) == frozen and modes == {n: m.training for n, m in model.named_modules()}
    for network in (sim, copy.deepcopy(sim)):
        before = statistics(network)
        train(network, DATA, 2, lr=1e-4)
        assert moved(before, network) == {"1", "4", "7"} - frozen
        train(network, DATA, 1, lr=1e-4)
        assert moved(before, network) == {"1", "4", "7"} - frozen
        nn.Sequential(network).train()
        assert {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training} == frozen


@pytest.mark.parametrize("case", CASES)
def test_frozen_stays_frozen_in_the_training_of_the_network_itself(case):
    model, frozen = case()
    before = statistics(model)
    for _ in range(2):
        train(model, DATA, 1, lr=1e-4)
        assert moved(before, model) == {"1", "4", "7"} - frozen and not model.training


def test_re_estimation_is_asked_for_and_reaches_frozen_ones_and_folding_takes_them_in():
    model, _ = one_frozen()
    sim = quantize(model, X)
    calibrate(sim, [X], 1)
    before = statistics(sim)
    with reestimate_bn_stats(sim, [X], 1):
        assert moved(before, sim) == {"1", "4", "7"}
        assert sim.training and not sim.get_submodule("4").training
    assert len(fold_batch_norms(sim)[1].folded) == 3
    assert fold_batch_norms(sim)[0].train() is not None


def test_dropout_of_a_frozen_part_stays_off_as_a_function_too():
    def forward(m, x):
        return m.head(m.drop(F.dropout(m.conv(x), 0.5, m.training)).mean((2, 3)))

    frozen = Net(forward, conv=nn.Conv2d(3, 4, 1), drop=nn.Dropout(0.5), head=nn.Linear(4, 4))
    model = nn.Sequential(frozen, nn.Dropout(0.5)).train()
    frozen.eval()
    sim = quantize(model, X, FLOAT).train()
    assert {name for name, m in sim.named_modules() if m.training and name} == {"1"} | {
        name for name in ("0.conv", "0.head") if sim.get_submodule(name).training
    } | {n for n, m in sim.named_modules() if m.training and ("quantizer" in n or "parametrizations" in n)}


def test_unfreezing_is_the_users_to_do():
    model, _ = trained_before()
    model.train()
    assert frozen_modules(model) == frozenset()
    train_mode(model)
    assert model[4].training
    model.eval()
    train_mode(model)
    assert model[4].training, "it was unfrozen before"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_that_is_new_freezes_nothing(wrap):
    model = wrap(randomize(flat_cnn()).eval())
    before = statistics(model.module)
    train(model, DATA, 1, lr=1e-4)
    assert moved(before, model.module) == {"1", "4", "7"}


def test_a_network_with_a_mode_of_its_own_that_cannot_be_copied_is_told_plainly():
    model, _ = norm_eval()
    model.lock = threading.Lock()
    with pytest.raises(UserError, match="cannot be copied"):
        quantize(model, X)


def test_a_network_in_evaluation_mode_freezes_nothing():
    assert sim_report(quantize(randomize(flat_cnn()).eval(), X)).frozen_bns == ()


def test_a_part_that_is_in_evaluation_mode_is_named_when_it_stays_so(caplog):
    model = nn.Sequential(randomize(flat_cnn()).eval(), nn.Identity())
    train(model, DATA, 1, lr=1e-4)
    assert "3 of 3 batch norms stay frozen" in caplog.text and "model.train()" in caplog.text
    caplog.clear()
    train(model.train(), DATA, 1, lr=1e-4)
    quantize(model.eval(), X)
    assert not caplog.text
    sim = quantize(nn.Sequential(randomize(flat_cnn()).eval(), nn.Identity()), X, FLOAT)
    assert "3 batch norms stay frozen" in caplog.text
    caplog.clear()
    train(sim.train(), DATA, 1, lr=1e-4)
    assert not caplog.text, "the simulation's own train() keeps them frozen"
