"""Training, evaluation and the comparison of logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from bnre_exp import (
    QuantScheme,
    TrainingDivergedError,
    UserError,
    calibrate,
    evaluate,
    quantize,
    train,
    weight_quantizers,
)
from bnre_exp.algorithms.compare import compare_outputs
from tests.networks import flat_cnn, randomize


def labelled(sizes=(8, 5, 11), classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        y = torch.randint(classes, (size,), generator=generator)
        x = torch.randn(size, 3, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1) / 2
        batches.append((x, y))
    return batches


def test_metrics_are_sums_over_samples_not_means_of_batches():
    model, data = randomize(flat_cnn()).train(), labelled()
    state = copy.deepcopy(model.state_dict())
    result = evaluate(model, data)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    model.eval()
    with torch.no_grad():
        logits = model(x)
    assert result.count == 24 and result.top1 == float((logits.argmax(1) == y).double().mean())
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert torch.equal(result.predictions, logits.argmax(1))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_evaluation_restores_each_modules_mode():
    model = randomize(flat_cnn()).train()
    model[4].eval()
    evaluate(model, labelled())
    assert model.training and model[1].training and not model[4].training


@pytest.mark.parametrize(
    ("loader", "message"),
    [([], "no batches"), ([torch.zeros(2, 3, 8, 8)], "no labels"), ([({"a": 1}, torch.zeros(2))], "forward_fn")],
)
def test_evaluation_of_unusable_loaders(loader, message):
    with pytest.raises(UserError, match=message):
        evaluate(flat_cnn(), loader)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_training_lowers_the_loss_and_reports_each_epoch(optimizer, schedule):
    torch.manual_seed(0)
    epochs, lr = [], 0.05 if optimizer == "sgd" else 0.005
    history = train(
        flat_cnn(), labelled(), 5, lr=lr, optimizer=optimizer, schedule=schedule, validation=labelled(seed=1),
        on_epoch=epochs.append,
    )  # fmt: skip
    assert [e.epoch for e in epochs] == [1, 2, 3, 4, 5] and epochs == history
    assert history[-1].loss < history[0].loss and history[-1].val_top1 is not None
    assert (history[-1].lr < lr * 0.1) == (schedule != "constant")


def test_weight_decay_spares_bn_biases_and_scales():
    sim = quantize(randomize(flat_cnn()), labelled()[0][0], QuantScheme(weight_bits=4, act_bits=8))
    calibrate(sim, [labelled()[0][0]], 1)
    before = {name: p.detach().clone() for name, p in sim.named_parameters()}
    no_gradient = lambda output, label: output.sum() * 0.0  # noqa: E731
    train(sim, labelled(), 1, lr=0.1, momentum=0.0, weight_decay=0.5, schedule="constant", loss_fn=no_gradient)
    changed = {name for name, p in sim.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{layer}.parametrizations.weight.original" for layer in (0, 3, 6, 11)}


def test_quantization_aware_training_learns_weights_and_scales():
    torch.manual_seed(0)
    sim = quantize(randomize(flat_cnn()), labelled()[0][0], QuantScheme(weight_bits=3, act_bits=4))
    calibrate(sim, [x for x, _ in labelled()], 3)
    before = {name: p.detach().clone() for name, p in sim.named_parameters()}
    history = train(sim, labelled(), 8, lr=0.02)
    assert history[-1].loss < history[0].loss
    moved = {name for name, p in sim.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{layer}.parametrizations.weight.0.scale" for layer in (0, 3, 6, 11)} <= moved
    assert sum(name.startswith("act_quantizers") and name.endswith("scale") for name in moved) == 6
    fixed = quantize(randomize(flat_cnn()), labelled()[0][0], QuantScheme(weight_bits=3, range_learning=False))
    calibrate(fixed, [x for x, _ in labelled()], 3)
    scales = {name: q.scale.clone() for name, q in weight_quantizers(fixed).items()}
    train(fixed, labelled(), 2, lr=0.02)
    assert all(torch.equal(q.scale, scales[name]) for name, q in weight_quantizers(fixed).items())


def test_bfloat16_trains_a_simulation():
    sim = quantize(randomize(flat_cnn()), labelled()[0][0], QuantScheme(weight_bits=4, act_bits=8))
    calibrate(sim, [x for x, _ in labelled()], 3)
    history = train(sim, labelled(), 4, lr=0.02, precision="bfloat16")
    assert history[-1].loss < history[0].loss
    assert all(p.dtype == torch.float32 for p in sim.parameters())


def test_a_loss_that_is_not_finite_stops_at_once():
    data = labelled()
    data[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingDivergedError, match=r"nan in epoch 1, batch 2.*learning rate \(it was 0.01"):
        train(flat_cnn(), data, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1, "optimizer": "lion"}, "lion"),
        ({"epochs": 1, "schedule": "x"}, "'x'"),
    ],
)
def test_training_refuses_what_it_does_not_know(arguments, message):
    with pytest.raises(UserError, match=message):
        train(flat_cnn(), labelled(), **arguments)
    with pytest.raises(UserError, match="length"):
        train(flat_cnn(), iter(labelled()), 1)


def test_compare_outputs_bypasses_quantizers_and_measures_the_largest_difference():
    x = labelled()[0][0]
    first = quantize(randomize(flat_cnn()), x, QuantScheme(weight_bits=8, act_bits=2))
    calibrate(first, [x], 1)
    second = copy.deepcopy(first)
    assert compare_outputs(first, second, labelled()).largest == 0
    with torch.no_grad():
        second.get_submodule("11").bias[3] += 0.5
    difference = compare_outputs(first, second, labelled())
    assert difference.largest == pytest.approx(0.5, rel=1e-4) and 0 < difference.relative < difference.largest
    with torch.no_grad():
        first.get_submodule("11").bias[3] = torch.nan
    difference = compare_outputs(first, first, labelled())
    assert math.isnan(difference.magnitude) and math.isnan(difference.relative)
