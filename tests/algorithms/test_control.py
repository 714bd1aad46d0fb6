"""Batch norms that stand still or move slowly in training, an average of the weights, and what is validated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp import QuantScheme, UserError, calibrate, evaluate, quantize, reestimate_bn_stats, train
from bnre_exp.quantsim.tracing.frozen import MARK
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn, randomize

DATA, OTHERS = labelled((16,) * 4), labelled(seed=1)


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(flat_cnn())
    if kind == "float":
        return model
    sim = quantize(model, DATA[0][0], QuantScheme(weight_bits=3, act_bits=8))
    calibrate(sim, [x for x, _ in DATA], 4)
    return sim


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: b.clone() for name, b in model.named_buffers() if name.rpartition(".")[2] in names}


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["float", "simulation"])
def test_frozen_statistics_stay_from_their_epoch_on_and_are_what_normalizes(kind):
    model, seen = network(kind), []
    before, gammas = buffers(model), [bn.weight.detach().clone() for bn in batch_norms(model)]

    def forward(net, batch):
        seen.append([bn.training for bn in batch_norms(net)])
        return net(batch[0])

    states = []
    train(
        model, DATA, 3, lr=0.01, freeze_bn_epoch=2, forward_fn=forward,
        on_epoch=lambda epoch: states.append((buffers(model), [bn.training for bn in batch_norms(model)])),
    )  # fmt: skip
    assert seen == [[True] * 3] * 4 + [[False] * 3] * 8
    assert not same(before, states[0][0]) and same(states[0][0], states[1][0]) and same(states[1][0], states[2][0])
    assert all(modes == [True] * 3 for _, modes in states)  # between epochs as without it
    assert not any(torch.equal(bn.weight, gamma) for bn, gamma in zip(batch_norms(model), gammas))


def test_statistics_that_are_frozen_all_along_are_those_of_the_start():
    sim = network("simulation")
    before = buffers(sim)
    train(sim, DATA, 2, freeze_bn_epoch=1)
    assert same(before, buffers(sim))


def test_a_freeze_is_not_taken_for_that_of_a_user_and_that_of_a_user_stays(caplog):
    model = network("float").train()
    model[4].eval()
    before = buffers(model)
    train(model, DATA, 2, freeze_bn_epoch=2)
    caplog.clear()
    train(model, DATA, 1, freeze_bn_epoch=2)  # as if it had not been frozen: only the user's is named
    assert "1 of 3 batch norms stay frozen" in caplog.text
    after = buffers(model)
    assert [torch.equal(before[f"{i}.running_mean"], after[f"{i}.running_mean"]) for i in (1, 4, 7)] == [0, 1, 0]
    assert [index for index, module in enumerate(model) if MARK in vars(module)] == [4]


@pytest.mark.parametrize("kind", ["float", "simulation"])
def test_the_momentum_of_batch_norms_is_that_of_the_training_and_then_their_own_again(kind):
    model = network(kind)
    batch_norms(model)[0].momentum = None  # a cumulative average
    own = [bn.momentum for bn in batch_norms(model)]
    last = []
    hook = batch_norms(model)[1].register_forward_hook(lambda bn, x, y: last.append(x[0].detach()))
    train(model, DATA, 1, lr=1e-9, bn_momentum=1.0)
    hook.remove()
    assert [bn.momentum for bn in batch_norms(model)] == own
    torch.testing.assert_close(batch_norms(model)[1].running_mean, last[-1].mean((0, 2, 3)))  # the last batch alone

    def fail(output, label):
        assert {bn.momentum for bn in batch_norms(model)} == {0.25}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(model, DATA, 1, bn_momentum=0.25, freeze_bn_epoch=1, loss_fn=fail)
    assert [bn.momentum for bn in batch_norms(model)] == own and all(bn.training for bn in batch_norms(model))


class Steps:
    """Keeps the parameters after each step."""

    tensors, settings, needs_end = {}, {}, False

    def __init__(self, model):
        self.model, self.seen = model, []

    def before_step(self, progress):
        pass

    def after_step(self, progress):
        self.seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def hold(self):
        pass

    def shares(self):
        return {}


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_network_ends_with_the_average_which_is_what_validation_sees(decay):
    plain, model = network("simulation"), network("simulation")
    steps, states = Steps(model), []
    history = train(
        model, DATA, 2, lr=0.05, ema_decay=decay, oscillations=steps, validation=OTHERS,
        on_epoch=lambda epoch: states.append(copy.deepcopy(model.state_dict())),
    )  # fmt: skip
    own = train(plain, DATA, 2, lr=0.05)
    assert [e.loss for e in history] == [e.loss for e in own]  # the training itself goes on with its own weights
    assert all(torch.equal(p, steps.seen[-1][name]) for name, p in plain.named_parameters())
    assert same(buffers(plain), buffers(model))  # of statistics there is no average
    for count, epoch in ((4, 0), (8, 1)):
        weights = torch.tensor([decay ** (count - i) for i in range(1, count + 1)], dtype=torch.float64)
        weights /= weights.sum()
        average = {
            name: sum(w * step[name].double() for w, step in zip(weights, steps.seen)).float()
            for name, _ in model.named_parameters()
        }
        averaged = network("simulation")
        averaged.load_state_dict({**states[epoch], **average})
        found = evaluate(averaged, OTHERS).metrics
        assert history[epoch].validation["loss"] == pytest.approx(found["loss"], rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(states[1][name], steps.seen[-1][name])  # until the end it is trained without


def test_validation_as_re_estimated_is_undone_bit_for_bit_and_changes_nothing_but_its_figures():
    plain, model, handles = network("simulation"), network("simulation"), []

    def re_estimated(net):
        assert net is model
        handles.append(reestimate_bn_stats(net, DATA, 3))
        return handles[-1]

    own = train(plain, DATA, 2, lr=0.05, validation=OTHERS)
    history = train(model, DATA, 2, lr=0.05, validation=OTHERS, before_validation=re_estimated)
    assert same(dict(plain.state_dict()), dict(model.state_dict())) and len(handles) == 2
    assert [e.loss for e in own] == [e.loss for e in history]
    reestimate_bn_stats(plain, DATA, 3)
    found = evaluate(plain, OTHERS).metrics
    assert history[-1].validation == found and own[-1].validation != found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_bn_epoch": 0}, "freeze_bn_epoch=0"),
        ({"freeze_bn_epoch": 1.5}, r"freeze_bn_epoch=1\.5"),
        ({"bn_momentum": 0}, "bn_momentum=0"),
        ({"bn_momentum": 1.1}, r"bn_momentum=1\.1"),
        ({"bn_momentum": True}, "bn_momentum=True"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0"),
        ({"ema_decay": "0.9"}, "ema_decay='0.9'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    model = network("float")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        train(model, DATA, 1, **arguments)
    assert same(dict(before), dict(model.state_dict()))
