"""Segmentation: losses and metrics against independent ones, and a U-Net from FP32 to the folded network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score

from bnre_exp import (
    UserError,
    evaluate,
    fold_batch_norms,
    quantize_biases,
    train,
)
from bnre_exp.tasks import Segmentation
from tests.networks import Net
from tests.tasks.scenes import UNet, batches, digit_masks, quantized_and_reestimated


def logits_of(n=6, classes=3, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, size, size, generator=generator)
    mask = torch.randint(0, classes, (n, size, size), generator=generator)
    return logits, mask


def measured(task, logits, mask, split=4):
    meter = task.meter()
    for some, masks in zip(logits.split(split), mask.split(split)):
        meter.update(some, (some, masks))
    return meter.compute()


@pytest.mark.parametrize("ignore", [None, 255])
def test_metrics_are_those_of_scikit_learn(ignore):
    logits, mask = logits_of()
    mask[mask == 2] = 1  # a class that is only predicted counts as one that is missed
    if ignore is not None:
        mask[:, 0] = ignore
        mask[5] = ignore  # a whole image
    found = measured(Segmentation(3, ignore_index=ignore), logits, mask)
    counts = mask != (-1 if ignore is None else ignore)
    predicted = logits.argmax(1)
    expected = jaccard_score(mask[counts], predicted[counts], average="macro")
    assert found.miou == pytest.approx(expected, abs=1e-6)
    assert found.pixel_accuracy == pytest.approx(float((mask == predicted)[counts].double().mean()), abs=1e-6)
    assert found.headline.name == "miou" and found.count == 6 and torch.equal(found.predictions.long(), predicted)
    for image in range(6):
        right = (mask == predicted)[image][counts[image]].double()
        assert float(found.scores[image]) == pytest.approx(float(right.mean()) if len(right) else 1.0)


def test_a_class_that_is_nowhere_does_not_count():
    mask = torch.zeros(2, 4, 4, dtype=torch.int64)
    logits = F.one_hot(mask, 3).movedim(-1, 1).float()
    assert measured(Segmentation(3), logits, mask).miou == 1.0


def test_losses():
    logits, mask = logits_of()
    mask[0, 0] = 255
    counts = mask != 255
    per_pixel = F.cross_entropy(logits.movedim(1, -1)[counts], mask[counts])
    torch.testing.assert_close(Segmentation(3).loss(logits, (None, mask)), per_pixel)
    dice = []
    for c in range(3):
        given, wanted = logits.softmax(1)[:, c][counts], (mask[counts] == c).float()
        dice.append((2 * (given * wanted).sum() + 1) / (given.sum() + wanted.sum() + 1))
    found = Segmentation(3, loss="dice_cross_entropy").loss(logits, (None, mask))
    torch.testing.assert_close(found, per_pixel + 1 - sum(dice) / 3)
    nothing = torch.full_like(mask, 255)
    assert float(Segmentation(3).loss(logits.requires_grad_(), (None, nothing)).detach()) == 0


def test_smaller_logits_dicts_and_masks_with_a_channel():
    logits, mask = logits_of(size=8)
    small = F.avg_pool2d(logits, 2)
    task = Segmentation(3)
    resized = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    for output, label in (
        ({"out": small, "aux": logits}, mask),
        ([small], mask[:, None]),
        (small, mask.to(torch.uint8)),
    ):
        torch.testing.assert_close(task.loss(output, (None, label)), F.cross_entropy(resized, mask))
        assert torch.equal(measured(task, small, mask).predictions.long(), resized.argmax(1))


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), "go from 3 to 3; the network tells 3 classes"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "float32.*expected classes, int64"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "expected classes, int64"),
        (torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), r"expects logits \[N, 3, H, W\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4, 4, dtype=torch.int64), r"expects logits \[N, 3, H, W\]"),
    ],
)
def test_what_does_not_fit_is_told(logits, mask, message):
    with pytest.raises(UserError, match=message):
        Segmentation(3).loss(logits, (None, mask))
    with pytest.raises(UserError, match=message):
        Segmentation(3).meter().update(logits, (None, mask))


def test_settings_and_checks():
    with pytest.raises(UserError, match="num_classes=1"):
        Segmentation(1)
    with pytest.raises(UserError, match="loss='dice'; expected one of cross_entropy, dice_cross_entropy"):
        Segmentation(3, loss="dice")
    task = Segmentation(3)
    task.check_labels({"train": (0, 2), "test": (0, 255)})
    with pytest.raises(UserError, match="the test masks have classes from 0 to 3; expected 0 to 2, and 255"):
        task.check_labels({"test": (0, 3)})
    task.check_output(torch.zeros(2, 3, 4, 4), 2)
    with pytest.raises(UserError, match=r"gives \[2, 3\]; segmentation into 3 classes expects logits \[2, 3, H, W\]"):
        task.check_output(torch.zeros(2, 3), 2)
    meter = task.meter()
    for size in (4, 5):
        meter.update(torch.zeros(1, 3, size, size), (None, torch.zeros(1, size, size, dtype=torch.int64)))
    with pytest.raises(UserError, match="masks of 2 sizes"):
        meter.compute()


def test_a_unet_from_float_to_folded():
    """2-bit weights cost it a fifth, and re-estimation brings a part of that back."""
    torch.manual_seed(0)
    task, model = Segmentation(3, loss="dice_cross_entropy"), UNet(3)
    data = batches(*digit_masks(512))
    test = batches(*digit_masks(96, train=False))
    train(model, data, 8, lr=0.1, task=task)
    fp32 = evaluate(model, test, task=task)
    assert fp32.miou > 0.7
    sim, before, after = quantized_and_reestimated(model, 2, data, test, task)
    assert before.miou + 0.03 < after.miou < fp32.miou
    folded, report = fold_batch_norms(sim)
    assert len(report.folded) == 4
    quantize_biases(folded)
    shipped = evaluate(folded, test, task=task)
    assert shipped.miou == pytest.approx(after.miou, abs=0.01)
    assert 0.98 < task.agreement(after.predictions, shipped.predictions) <= 1


def test_a_network_of_one_pixel_a_class_is_trained_by_the_default_loss():
    model = Net(lambda m, x: m.head(x), head=torch.nn.Conv2d(1, 2, 1))
    images, masks = digit_masks(64)
    data = batches(images, (masks > 0).long())
    train(model, data, 10, lr=1.0, task=Segmentation(2))
    assert evaluate(model, data, task=Segmentation(2)).miou > 0.9
