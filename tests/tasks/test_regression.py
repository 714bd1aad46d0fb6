"""Regression: metrics against closed forms and scikit-image's definitions, and a denoiser from FP32 to folded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnre_exp import (
    UserError,
    evaluate,
    fold_batch_norms,
    train,
)
from bnre_exp.tasks import Regression
from tests.tasks.scenes import UNet, batches, digit_masks, quantized_and_reestimated


def measured(task, given, target, split=3):
    meter = task.meter()
    for some, wanted in zip(given.split(split), target.split(split)):
        meter.update(some, (some, wanted))
    return meter.compute()


def test_psnr_and_mae_are_means_over_samples():
    target = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([0.1, 0.2, 0.01, 0.0, 0.5])
    given = target + errors.view(5, 1, 1, 1)
    found = measured(Regression(data_range=2.0), given, target)
    psnr = [20 * math.log10(2 / e) if e else 100.0 for e in errors.tolist()]
    assert found.psnr == pytest.approx(sum(psnr) / 5, rel=1e-5)
    assert found.mae == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found.loss == pytest.approx(float(errors.mean()), rel=1e-5)
    torch.testing.assert_close(found.scores, torch.tensor(psnr), rtol=1e-4, atol=1e-3)
    assert found.headline.name == "psnr" and torch.equal(found.predictions, given)


def test_ssim_of_equal_images_is_one_and_falls_with_noise():
    target = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    values = [measured(Regression(metric="ssim"), target + s * noise, target).ssim for s in (0.0, 0.1, 0.5)]
    assert values[0] == pytest.approx(1) and values[0] > values[1] > values[2]


def test_numbers_have_a_mean_absolute_error_alone():
    task = Regression(metric="mae")
    found = measured(task, torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]]))
    assert set(found.metrics) == {"mae", "loss"} and found.value == 1.5
    assert found.scores.tolist() == [-1, -2] and not found.headline.higher_is_better
    with pytest.raises(UserError, match="metric=psnr, but the network gives .*Set metric=mae"):
        measured(Regression(), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(UserError, match="metric=ssim.*at least 11 pixels"):
        measured(Regression(metric="ssim"), torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_agreement_is_of_whole_samples():
    a = torch.zeros(4, 1, 2, 2)
    b = a.clone()
    b[0, 0, 0, 0], b[1] = 0.9 / 255, 1.1 / 255
    assert Regression().agreement(a, b) == 0.75 and Regression(data_range=255.0).agreement(a, b) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(data_range=0), "data_range=0; expected a number above 0"),
        (lambda: Regression(metric="rmse"), "metric='rmse'; expected one of psnr, ssim, mae"),
        (lambda: Regression(loss="l2"), "loss='l2'; expected one of l1, mse, huber"),
        (lambda: Regression().loss(torch.zeros(2, 1), (0, torch.zeros(2))), r"are float32 \[2\].*gives \[2, 1\]"),
        (lambda: Regression().loss(torch.zeros(2), (0, [0, 0])), "are list"),
        (lambda: Regression().loss(torch.zeros(2), (0, torch.zeros(2)), 0.1), "no labels to smooth"),
        (lambda: Regression().check_output(torch.zeros(3, 1), 2), r"gives float32 \[3, 1\]"),
        (lambda: Regression().check_output("no", 2), "nothing of tensor type"),
    ],
)
def test_what_does_not_fit_is_told(make, message):
    with pytest.raises(UserError, match=message.replace("float32", r"(torch\.)?float32")):
        make()


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = UNet(1)

    def forward(self, x):
        return x - self.noise(x)


def test_a_denoiser_from_float_to_folded():
    torch.manual_seed(0)
    clean, held_out = digit_masks(256)[0], digit_masks(64, train=False)[0]
    data = batches(clean + 0.2 * torch.randn_like(clean), clean)
    test = batches(held_out + 0.2 * torch.randn_like(held_out), held_out)
    task, model = Regression(), Denoiser()
    noisy = measured(task, torch.cat([x for x, _ in test]), held_out)
    train(model, data, 6, lr=0.05, task=task)
    fp32 = evaluate(model, test, task=task)
    assert fp32.psnr > noisy.psnr + 4
    sim, before, after = quantized_and_reestimated(model, 3, data, test, task)
    assert before.psnr + 0.5 < after.psnr < fp32.psnr
    folded, _ = fold_batch_norms(sim)
    assert evaluate(folded, test, task=task).psnr == pytest.approx(after.psnr, abs=0.05)
