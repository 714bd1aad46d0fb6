"""Standard errors against their formula, and against how far estimates really are from the truth."""

from __future__ import annotations

import math

import pytest
import torch

from bnre_exp.algorithms.sampling import MIN_BATCHES, SamplingErrors


def test_errors_are_those_of_the_formula():
    means, variances = torch.rand(7, 3).double(), torch.rand(7, 3).double() + 0.5
    errors = SamplingErrors(torch.zeros(3))
    for mean, var in zip(means, variances):
        errors.add(mean, var)
    of_mean, of_var = errors.of_channels()
    sigma = variances.mean(0).sqrt()
    torch.testing.assert_close(of_mean, means.std(0) / math.sqrt(7) / sigma)
    torch.testing.assert_close(of_var, variances.std(0) / math.sqrt(7) / variances.mean(0))
    worst = torch.maximum(of_mean, of_var)
    assert errors.of_layers([1, 2]) == pytest.approx([float(worst[0]), float(worst[1:].max())])


def test_errors_are_in_terms_of_what_batch_norm_divides_by():
    tiny, eps = 1e-9, 1e-5
    errors, plain = SamplingErrors(torch.tensor([eps, eps])), SamplingErrors(torch.zeros(2))
    for number in range(8):
        for each in (errors, plain):
            each.add(
                torch.tensor([tiny**0.5 * number, number]), torch.tensor([tiny * (1 + number % 2), 1 + number % 2])
            )
    (of_mean, of_var), before = errors.of_channels(), plain.of_channels()
    assert of_mean[0] == pytest.approx(float(before[0][0]) * (1.5 * tiny / (1.5 * tiny + eps)) ** 0.5, rel=1e-4)
    assert of_var[0] < 1e-4 < 0.1 < before[1][0] and of_var[1] == pytest.approx(float(before[1][1]), rel=1e-4)


def test_few_batches_say_nothing_and_constant_channels_are_certain():
    errors = SamplingErrors(torch.zeros(2))
    for number in range(MIN_BATCHES):
        assert errors.of_layers([2]) == [math.inf]
        errors.add(torch.tensor([2.0, number]), torch.tensor([0.0, 1.0]))
    of_mean, of_var = errors.of_channels()
    assert of_mean[0] == of_var[0] == of_var[1] == 0 < of_mean[1]


def test_channels_that_a_batch_does_not_reach_keep_their_errors():
    torch.manual_seed(0)
    alone, both, some = SamplingErrors(torch.zeros(1)), SamplingErrors(torch.zeros(2)), torch.tensor([True, False])
    for number in range(9):
        mean, var = torch.randn(2), torch.rand(2) + 1
        both.add(mean, var, None if number % 2 else some)
        if number % 2:
            alone.add(mean[1:], var[1:])
    torch.testing.assert_close(both.of_channels()[0][1], alone.of_channels()[0][0])


@pytest.mark.parametrize("batch", [8, 64])
def test_errors_are_as_large_as_estimates_are_wrong(batch):
    """Of skewed values, whose variance is harder to tell than that of normal ones."""
    torch.manual_seed(0)
    channels, batches = 4000, 20
    errors, means, variances = SamplingErrors(torch.zeros(channels)), [], []
    for _ in range(batches):
        values = torch.distributions.Gamma(2.0, 1.0).sample((batch, channels))
        means.append(values.mean(0))
        variances.append(values.var(0))
        errors.add(means[-1], variances[-1])
    of_mean, of_var = errors.of_channels()
    wrong = (torch.stack(means).mean(0) - 2) / math.sqrt(2)
    assert float(of_mean.mean()) == pytest.approx(float(wrong.std()), rel=0.1)
    wrong = (torch.stack(variances).mean(0) - 2) / 2
    assert float(of_var.square().mean().sqrt()) == pytest.approx(float(wrong.std()), rel=0.15)
