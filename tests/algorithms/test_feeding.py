"""Loaders of all kinds: without a length, with a wrong one, empty at the second pass; tensors of inference mode."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bnre_exp import QuantScheme, UserError, calibrate, evaluate, quantize, reestimate_bn_stats, train
from bnre_exp.algorithms.compare import compare_outputs
from bnre_exp.algorithms.feeding import Passes, length_of, not_finite, take_batches, to_device
from bnre_exp.report.console import ConsoleProgress
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn, randomize


class Stream(IterableDataset):
    """Batches without a length, as :class:`torch.utils.data.DataLoader` takes them with ``batch_size=None``."""

    def __iter__(self):
        return iter(labelled())


class Told(Stream):
    def __init__(self, length) -> None:
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise NotImplementedError("how long it is depends on the filter")
        return self.length


def loader(length=None, told=False):
    return DataLoader(Told(length) if told else Stream(), batch_size=None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(flat_cnn())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


WITHOUT_LENGTH = [loader(), loader(told=True), Told(None)]


@pytest.mark.parametrize("data", WITHOUT_LENGTH, ids=["iterable dataset", "len not implemented", "no loader"])
def test_a_loader_without_a_length_is_evaluated_and_trained_on(data):
    assert length_of(data) is None and length_of(labelled()) == 3
    model, same = network(), network()
    terminal = Console(force_terminal=True, file=io.StringIO(), width=80)
    shown = evaluate(model, data, progress=ConsoleProgress(terminal))
    assert shown.metrics == evaluate(model, labelled()).metrics and "/?" in terminal.file.getvalue()
    with pytest.raises(UserError, match="no length, which schedule='cosine' needs; pass steps_per_epoch"):
        train(model, data, 2)
    assert torch.equal(weights(model), weights(same))
    for how in ({"schedule": "constant"}, {"steps_per_epoch": 3}, {"steps_per_epoch": 3, "schedule": "one_cycle"}):
        model, same = network(), network()
        history = train(model, data, 2, validation=data, progress=ConsoleProgress(terminal), **how)
        expected = train(same, labelled(), 2, validation=labelled(), **how)
        assert torch.equal(weights(model), weights(same))
        assert [(e.loss, e.lr, e.val_loss) for e in history] == [(e.loss, e.lr, e.val_loss) for e in expected]
    assert compare_outputs(model, same, data).largest == 0
    reestimate_bn_stats(model, data, 4)


def test_an_epoch_of_so_many_steps_cuts_a_long_loader_and_repeats_a_short_one():
    for steps, batches in ((2, labelled()[:2]), (5, [*labelled(), *labelled()[:2]])):
        model, same = network(), network()
        train(model, labelled(), 2, steps_per_epoch=steps)
        train(same, batches, 2)
        assert torch.equal(weights(model), weights(same))


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize(("length", "message"), [(2, "is 2 batches, but it yields more"), (7, "is 7 .* yields 3,")])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_length_that_is_not_true_is_told(schedule, length, message):
    with pytest.raises(UserError, match=f"{message}.*correct its __len__, pass steps_per_epoch"):
        train(network(), loader(length, told=True), 2, schedule=schedule)
    assert len(train(network(), loader(length, told=True), 2, schedule="constant")) == 2
    assert evaluate(network(), loader(length, told=True)).count == 24


def test_loaders_that_run_dry_are_told():
    with pytest.raises(UserError, match="no batches in epoch 2"):
        train(network(), iter(labelled()), 2, schedule="constant")
    with pytest.raises(UserError, match="yields no batches, but 3 are needed"):
        train(network(), iter(labelled()), 2, steps_per_epoch=3)
    with pytest.raises(UserError, match="at least one batch"):
        train(network(), [], 1, schedule="constant")
    with pytest.raises(UserError, match="compare_outputs: the data loader yields no batches"):
        compare_outputs(network(), network(), [])
    with pytest.raises(UserError, match="epoch 1, batch 2 of train: the batch has no samples"):
        train(network(), [labelled()[0], (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))], 1)
    with pytest.raises(UserError, match="hold no samples"):
        evaluate(network(), [(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))])
    with pytest.raises(UserError, match="batch 4 of train: a batch norm gets one value per channel.*drop_last"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10)), labelled((8, 5, 11, 1)), 1)


@pytest.mark.parametrize("count", [0, -1, 1.5, None, "2", True])
def test_batches_are_counted_in_whole_numbers(count):
    with pytest.raises(UserError, match="num_batches=.*: expected at least 1"):
        next(take_batches(labelled(), count, Passes()))


def test_batches_of_inference_mode_train_and_evaluate_like_others():
    with torch.inference_mode():
        made = [(x.clone(), y.clone()) for x, y in labelled()]
    x = made[0][0]
    assert x.is_inference() and not to_device({"x": [x]}, x.device)["x"][0].is_inference()
    ordinary = labelled()[0][0]
    assert to_device(ordinary, ordinary.device) is ordinary
    sims = [quantize(network(), ordinary, QuantScheme(weight_bits=4, act_bits=8)) for _ in range(2)]
    for sim, data in zip(sims, (made, labelled())):
        calibrate(sim, data, 2)
        train(sim, data, 2)
        reestimate_bn_stats(sim, data, 3)
    assert torch.equal(weights(sims[0]), weights(sims[1]))
    assert evaluate(sims[0], made).metrics == evaluate(sims[1], labelled()).metrics
    with torch.inference_mode():
        assert evaluate(sims[0], made).metrics == evaluate(sims[1], labelled()).metrics
    train(
        sims[0], [{"x": x, "y": y} for x, y in made], 1, forward_fn=lambda m, b: m(b["x"]), target_fn=lambda b: b["y"]
    )


def test_training_without_gradients_is_told_before_anything():
    model = network()
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(UserError, match=r"under torch\.no_grad or torch\.inference_mode; call it outside"):
            train(model, labelled(), 1)
    assert torch.equal(weights(model), weights(network()))
    with pytest.raises(UserError, match="no parameter of the network requires a gradient"):
        train(network().requires_grad_(False), labelled(), 1)
    with torch.inference_mode():
        made = network()
    with pytest.raises(UserError, match=r"made under torch\.inference_mode.*copy\.deepcopy\(model\)"):
        train(made, labelled(), 1)
    train(copy.deepcopy(made), labelled(), 1)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output, label: output.sum().detach(), "batch 1 of train: the loss does not depend on what is trained"),
        (lambda output, label: output.sum(1), r"the loss is \[8\]; expected a tensor of one number"),
        (lambda output, label: 1.0, "the loss is a float"),
    ],
)
def test_a_loss_without_a_gradient_is_told(loss_fn, message):
    with pytest.raises(UserError, match=message):
        train(network(), labelled(), 1, loss_fn=loss_fn)


def test_outputs_of_different_shapes_are_not_compared():
    with pytest.raises(UserError, match=r"\[8, 10\] and \[8, 1\]"):
        compare_outputs(network(), nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), labelled())


def test_what_is_not_finite_in_a_network_is_named():
    model = network()
    assert not_finite(model) == []
    with torch.no_grad():
        model[1].running_var[0], model[11].bias[2], model[0].weight[0] = torch.nan, torch.inf, -torch.inf
    assert not_finite(model) == ["0.weight", "11.bias", "1.running_var"]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, data: evaluate(model, data),
        lambda model, data: train(model, data, 1),
        lambda model, data: reestimate_bn_stats(model, data, 1),
    ],
)
def test_a_network_without_values_is_told_so(use):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4)).to("meta")
    with pytest.raises(UserError, match="on the meta device"):
        use(model, [(torch.randn(3, 4), torch.arange(3))])


def test_what_is_no_network_is_told_so():
    with pytest.raises(UserError, match="got function"):
        evaluate(lambda x: x, labelled())
