"""Where labels are in a batch, what labels and logits may be, and what an evaluation says of itself."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from bnre_exp import TrainingDivergedError, UserError, evaluate, train
from bnre_exp.tasks import Classification, Evaluation
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn, randomize

Pair = namedtuple("Pair", "image label")
FORMS = {
    "dict": (lambda x, y: {"image": x, "label": y}, lambda m, b: m(b["image"]), lambda b: b["label"]),
    "meta in between": (lambda x, y: (x, torch.zeros_like(y), y), None, lambda b: b[2]),
    "label and meta": (lambda x, y: [x, y, ["a.png"] * len(y)], None, lambda b: b[1]),
    "nested": (lambda x, y: (x, {"label": y}), None, lambda b: b[1]["label"]),
}
FEW = labelled()[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(flat_cnn())


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_where_target_fn_says(form):
    make, forward_fn, target_fn = FORMS[form]
    data, how = [make(x, y) for x, y in labelled()], {"forward_fn": forward_fn, "target_fn": target_fn}
    expected = evaluate(network(), labelled())
    assert evaluate(network(), data, **how).metrics == expected.metrics
    by_task = evaluate(network(), data, forward_fn, task=Classification(10, target_fn))
    assert by_task.metrics == expected.metrics
    ways = [how, {**how, "loss_fn": F.cross_entropy}]
    ways += [{"forward_fn": forward_fn, "task": Classification(target_fn=target_fn), "loss_fn": F.cross_entropy}]
    for way in ways:
        model, same = network(), network()
        history = train(model, data, 2, validation=data, **way)
        plain = train(same, labelled(), 2, validation=labelled())
        assert [(e.loss, e.val_loss) for e in history] == [(e.loss, e.val_loss) for e in plain]


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_never_guessed(form):
    make, forward_fn, _ = FORMS[form]
    data = [make(x, y) for x, y in labelled()]
    for loss_fn in (None, lambda output, label: output.sum()):
        if form != "nested" or loss_fn is None:  # a pair is (input, label), whatever a loss of one's own takes for one
            with pytest.raises(UserError, match="target_fn"):
                train(network(), data, 1, forward_fn=forward_fn, loss_fn=loss_fn)
    with pytest.raises(UserError, match="target_fn"):
        evaluate(network(), data, forward_fn)


def test_a_pair_of_any_kind_has_its_label_second_and_other_batches_none():
    for pair in (tuple, list, lambda xy: Pair(*xy)):
        assert evaluate(network(), [pair(xy) for xy in labelled()]).count == 24
    for batch in (FEW[0], (FEW[0],), [FEW[0]]):
        with pytest.raises(UserError, match=r"must be \(input, label\); this loader yields no labels .*target_fn"):
            train(network(), [batch], 1)
    with pytest.raises(UserError, match="task and target_fn are both given"):
        evaluate(network(), labelled(), task=Classification(), target_fn=lambda batch: batch[1])


LABELS = [
    (lambda y: y - 5, "go from -.* expected 0 to 9"),
    (lambda y: y + 5, "to 1.; the network tells 10 classes apart: expected 0 to 9"),
    (lambda y: torch.full_like(y, -100), "go from -100 to -100"),  # what cross-entropy would leave out
    (lambda y: y + 0.5, r"float32 \[8\]; expected classes, int64 \[8\]"),
    (lambda y: y[:, None], r"int64 \[8, 1\]"),
    (lambda y: y[:3], r"int64 \[3\]"),
    (lambda y: y.tolist(), "a list"),
    (lambda y: [str(label) for label in y], "a list"),
]


@pytest.mark.parametrize(("change", "message"), LABELS)
def test_labels_that_do_not_fit_are_told(change, message):
    data = [(FEW[0], change(FEW[1]))]
    for call in (lambda: evaluate(network(), data), lambda: train(network(), data, 1)):
        with pytest.raises(UserError, match=message):
            call()


def test_labels_of_every_whole_type_are_taken_and_probabilities_train():
    expected = evaluate(network(), [FEW]).metrics
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        data = [(FEW[0], FEW[1].to(dtype))]
        assert evaluate(network(), data).metrics == expected
        assert train(network(), data, 1)[0].loss == train(network(), [FEW], 1)[0].loss
    soft = [(FEW[0], F.one_hot(FEW[1], 10).double())]
    assert train(network(), soft, 1)[0].loss == pytest.approx(train(network(), [FEW], 1)[0].loss, rel=1e-6)
    with pytest.raises(UserError, match=r"float64 \[8, 10\]; expected classes"):
        evaluate(network(), soft)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)), r"an output \[8\]; expected logits \[N, cl"),
        (nn.Conv2d(3, 10, 3), r"int64 \[8\]; expected classes, int64 \[8, 6, 6\]"),
    ],
)
def test_outputs_that_are_no_logits_are_told(model, message):
    for call in (lambda: evaluate(model, [FEW]), lambda: train(model, [FEW], 1)):
        with pytest.raises(UserError, match=message):
            call()
    dense = [(FEW[0], torch.zeros(8, 6, 6, dtype=torch.int64))]
    if isinstance(model, nn.Conv2d):  # its fraction of right pixels would have been above 1
        with pytest.raises(UserError, match="another task"):
            evaluate(model, dense)


def test_double_precision_is_kept():
    x, y = FEW[0].double(), FEW[1]
    model = network().double()
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(x), y)
    assert evaluate(model, [(x, y)]).loss == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_told_with_their_batch_and_cause(value):
    model, data = network(), labelled()
    data[1][0][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"evaluate: batch 2: .* not finite \(\d+ of 50 numbers\); the batch holds NaN"):
        evaluate(model, data)
    with torch.no_grad():
        model[11].bias[3] = value
    with pytest.raises(UserError, match=r"batch 1: .* \(8 of 80 numbers\); 11.bias hold"):
        evaluate(model, labelled())
    overflow = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).half()
    with torch.no_grad():
        overflow[1].weight.fill_(60000)
    with pytest.raises(UserError, match="that their type does not hold"):
        evaluate(overflow, [(FEW[0].half() * 1000, FEW[1])])


def test_a_class_may_be_ruled_out_by_minus_infinity():
    model = network()
    with torch.no_grad():
        model[11].bias[3] = -math.inf
    labels = torch.zeros_like(FEW[1])
    result = evaluate(model, [(FEW[0], labels)])
    assert math.isfinite(result.loss) and not (result.predictions == 3).any()


class Root(nn.Module):
    """Its value is finite where its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale.square().sum().sqrt() + x.flatten(1)[:, :10]


def test_a_gradient_that_is_not_finite_in_the_last_step_is_told():
    saved = []

    class Keeping:
        def load(self):
            return None

        def save(self, snapshot):
            saved.append(snapshot)

    with pytest.raises(
        TrainingDivergedError, match="After epoch 1 of train scale hold NaN or infinity, though the loss"
    ):
        train(Root(), [FEW], 1, snapshots=Keeping())
    assert not saved


@dataclass
class Study:
    name: str
    rows: dict[str, Evaluation]


def test_an_evaluation_prints_its_metrics_and_no_predictions():
    result = evaluate(network(), labelled())
    for text in (repr(result), str(result), f"{[result]}", repr(Study("a", {"fp32": result}))):
        assert "tensor" not in text and "predictions" not in text and len(text) < 250
        assert f"'top1': {result.top1}" in text and "count=24" in text


def test_weights_that_grew_too_large_in_the_last_step_are_told_with_the_learning_rate():
    with pytest.raises(
        UserError, match="train: validation: batch 1: the network's outputs are not finite.*learning rate"
    ):
        train(flat_cnn(), [FEW], 1, lr=1e30, validation=[FEW])


@pytest.mark.parametrize("classes", [6, 40])
def test_top5_is_that_of_torchmetrics_whatever_the_batches(classes):
    logits, labels = torch.randn(57, classes), torch.randint(classes, (57,))
    expected = float(multiclass_accuracy(logits, labels, classes, average="micro", top_k=5))
    assert 0 < expected < 1
    for size in (57, 16, 1):
        meter = Classification().meter()
        for some, known in zip(logits.split(size), labels.split(size)):
            meter.update(some, (some, known))
        result = meter.compute()
        assert result.top5 == pytest.approx(expected, abs=1e-6) and result.top5 >= result.top1
        assert result.value == result.top1 and result.count == 57


def test_there_is_no_top5_where_five_guesses_are_all_classes():
    for classes in (2, 5):
        meter = Classification(classes).meter()
        meter.update(torch.randn(4, classes), (None, torch.tensor([0, 1, 1, 0])))
        assert set(meter.compute().metrics) == {"top1", "loss"}


def test_a_label_ruled_out_is_not_among_the_five():
    logits = torch.full((1, 7), -math.inf)
    logits[0, :6] = torch.arange(6.0)
    for label, expected in ((5, 1), (1, 1), (0, 0), (6, 0)):
        meter = Classification().meter()
        meter.update(logits, (None, torch.tensor([label])))
        assert meter.compute().top5 == expected
