"""How far batch norms moved: closed forms over their channels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnre_exp.algorithms.drift import KL, RATIOS, SHIFT, SHIFTS, bn_drift, drift_columns

EPS = 1e-3


def moved(shifts: torch.Tensor, ratios: torch.Tensor):
    """The drift of a BN with these shifts [sd] and ratios of the variances, eps included, one a channel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, len(shifts), 1), nn.BatchNorm2d(len(shifts), eps=EPS))
    mean, variance = torch.randn(len(shifts)).double(), torch.rand(len(shifts)).double() + 0.5
    after = mean + shifts * (variance + EPS).sqrt(), (variance + EPS) * ratios - EPS
    return bn_drift(net, {"1": (mean, variance)}, {"1": after})


def test_shift_ratio_and_divergence_are_those_of_normal_distributions():
    shifts, ratios = torch.tensor([3.0, -4.0]).double(), torch.tensor([2.0, 8.0]).double()
    (row,) = moved(shifts, ratios)
    assert (row.name, row.channels, row.kind) == ("1", 2, "")
    assert row.shift == pytest.approx(math.sqrt(12.5)) and row.ratio == pytest.approx(4.0)
    start = torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double())
    end = torch.distributions.Normal(shifts, ratios.sqrt())
    assert row.kl == pytest.approx(float(torch.distributions.kl_divergence(end, start).mean()))


def test_quantiles_are_over_the_channels_and_keep_the_sign():
    order = torch.randperm(101)
    shifts, ratios = (torch.arange(101) - 30.0).double()[order], (torch.arange(101) + 1.0).double()[order]
    columns = drift_columns(moved(shifts, ratios))
    assert [columns[name][0] for name in SHIFTS] == pytest.approx([-25, 20, 65])
    assert [columns[name][0] for name in RATIOS] == pytest.approx([6, 51, 96])
    assert columns[SHIFT][0] == pytest.approx(float(shifts.square().mean().sqrt()))


def test_nothing_moved():
    (row,) = moved(torch.zeros(5).double(), torch.ones(5).double())
    assert row.shifts == (0, 0, 0) and row.ratios == pytest.approx((1, 1, 1))
    assert drift_columns([row])[KL][0] == pytest.approx(0, abs=1e-12)
