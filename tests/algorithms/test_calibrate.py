"""Calibration: what it changes, and that data or a network that it cannot use are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, UserError, activation_quantizers, calibrate, quantize
from tests.networks import Net, flat_cnn, randomize

X = torch.randn(4, 3, 16, 16)


def test_calibration_changes_ranges_only_and_nothing_if_it_fails():
    sim = quantize(randomize(flat_cnn()), X, QuantScheme(act_bits=8)).train()
    before = {k: v.clone() for k, v in sim.state_dict().items()}
    with pytest.raises(UserError, match="not finite"):
        calibrate(sim, [X, X * float("inf")], 2)
    assert all(torch.equal(v, before[k]) or bool(v.isnan().all()) for k, v in sim.state_dict().items())
    calibrate(sim, [X], 3)
    changed = {k for k, v in sim.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("act_quantizers.") for k in changed) and sim.training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ["mse", "minmax", "percentile"])
def test_one_bad_value_in_one_batch_is_refused_by_name_and_the_ranges_stay(value, estimator):
    sim = quantize(randomize(flat_cnn()), X, QuantScheme(act_range=estimator))
    calibrate(sim, [X], 1)
    before = [(float(q.scale), float(q.zero_point)) for q in activation_quantizers(sim).values()]
    bad = X.clone()
    bad[1, 2, 3, 4] = value
    with pytest.raises(UserError, match=r"activations of input_1 are not finite.*batch 2 .*data loader"):
        calibrate(sim, [X, bad, X], 3)
    assert before == [(float(q.scale), float(q.zero_point)) for q in activation_quantizers(sim).values()]
    assert all(q.observer is None for q in activation_quantizers(sim).values())


@pytest.mark.parametrize(
    ("tensor", "value", "cause"),
    [
        ("4.running_var", -1.0, "4.running_var is negative"),
        ("4.running_var", math.nan, "4.running_var is not finite"),
        ("4.weight", math.inf, "4.weight is not finite"),
        ("3.bias", math.nan, "3.bias is not finite"),
    ],
)
def test_what_made_an_activation_not_finite_is_named(tensor, value, cause):
    model = randomize(flat_cnn())
    model[3].bias = nn.Parameter(torch.zeros(model[3].out_channels))
    with torch.no_grad():
        {**dict(model.named_parameters()), **dict(model.named_buffers())}[tensor][0] = value
    sim = quantize(model, X)
    with pytest.raises(UserError, match=f"activations of 3 are not finite.*batch 1 .*{cause}"):
        calibrate(sim, [X], 1)


@pytest.mark.parametrize("number", [None, "3", 1.5, 0, -1, True])
def test_num_batches_is_a_whole_number(number):
    with pytest.raises(UserError, match="num_batches=.*expected at least 1"):
        calibrate(quantize(flat_cnn(), X), [X], number)


def test_a_mask_of_infinity_is_given_as_a_cause():
    mask = torch.tensor([False, True])
    sim = quantize(
        Net(lambda m, x: m.fc(x).masked_fill(mask, -torch.inf).softmax(1), fc=nn.Linear(3, 2)), X[:, :, 0, 0]
    )
    with pytest.raises(UserError, match="a mask of -inf"):
        calibrate(sim, [X[:, :, 0, 0]], 1)
