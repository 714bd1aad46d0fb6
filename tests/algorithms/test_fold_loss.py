"""What folding will cost, against what it costs."""

from __future__ import annotations

import pytest
import torch

from bnre_exp import QuantScheme, UserError, calibrate, fold_batch_norms, quantize
from bnre_exp.algorithms.fold import bn_affine
from bnre_exp.algorithms.fold_loss import fold_loss
from tests.networks import flat_cnn, randomize, unequal_batches

BATCHES = unequal_batches((3, 8, 8))


def sim_of(bits: int = 4, **how):
    sim = quantize(randomize(flat_cnn()).eval(), BATCHES[0], QuantScheme(weight_bits=bits, **how))
    calibrate(sim, BATCHES, 2)
    return sim


def test_an_exact_fold_costs_nothing():
    assert fold_loss(sim_of()) == ()


@pytest.mark.parametrize(
    ("how", "mode", "reason", "remedy"),
    [
        ({"per_channel": False}, "scale", "one scale for the whole tensor", "per_channel=true"),
        ({}, "weight", "fold.mode=weight", "fold.mode=scale"),
    ],
)
def test_each_layer_that_is_rounded_again_is_named_with_its_error(how, mode, reason, remedy):
    sim = sim_of(**how)
    before = {name: value.clone() for name, value in sim.state_dict().items()}
    losses = fold_loss(sim, mode)
    assert all(torch.equal(value, before[name]) for name, value in sim.state_dict().items())
    folded, report = fold_batch_norms(sim, mode)
    assert [(loss.layer, loss.bn) for loss in losses] == list(report.folded) and len(losses) == len(report.lossy) > 1
    for loss in losses:
        bn = sim.get_submodule(loss.bn)
        weight = sim.get_submodule(loss.layer).weight.detach().double()
        exact = weight * bn_affine(bn).gain.view(-1, *[1] * (weight.dim() - 1))
        difference = folded.get_submodule(loss.layer).weight.double() - exact
        assert loss.error == pytest.approx(float(difference.norm() / exact.norm()), rel=1e-3, abs=1e-7)
        assert reason in loss.reason and remedy in loss.remedy


def test_more_bits_cost_less():
    errors = [max(loss.error for loss in fold_loss(sim_of(bits, per_channel=False))) for bits in (3, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_what_folding_refuses_is_refused():
    with pytest.raises(UserError, match="expected one of scale, weight"):
        fold_loss(sim_of(), "wieght")
