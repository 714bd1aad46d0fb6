"""Batch norm that is called as a function: a module where its tensors are the network's own, else named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp import (
    QuantScheme,
    UserError,
    bypassed,
    calibrate,
    fold_batch_norms,
    quantize,
    reestimate_bn_stats,
    sim_report,
    train,
)
from tests.networks import Net, randomize

X = torch.randn(4, 3, 16, 16)
NAME = "batch_norm_module"
FLOAT = QuantScheme(weight_bits=None, act_bits=None)


class Functional(nn.Module):
    """forward(self, y): what becomes of the conv's output."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), forward
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.2)
        self.weight, self.bias = nn.Parameter(torch.rand(8) - 0.5), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.act(self, self.conv(x))


class Moving(Functional):
    def forward(self, x):
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.weight, self.bias, self.training, 0.3, 1e-3)
        return F.dropout(y, 0.1, self.training).mean((2, 3))


class MixedModes(Functional):
    def forward(self, x):
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.weight, self.bias)
        return F.dropout(y, 0.1, self.training)


class OwnBatchNorm(nn.Module):
    """A batch norm that is no subclass of torch's."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


FORMS = {
    "F": lambda m, y: F.batch_norm(y, m.mean, m.var, m.weight, m.bias, False),
    "keywords": lambda m, y: F.batch_norm(y, running_mean=m.mean, running_var=m.var, weight=m.weight, bias=m.bias),
    "torch": lambda m, y: torch.batch_norm(y, m.weight, m.bias, m.mean, m.var, False, 0.1, 1e-5, False),
    "aten": lambda m, y: torch.ops.aten.batch_norm(y, m.weight, m.bias, m.mean, m.var, False, 0.1, 1e-5, False),
    "no affine": lambda m, y: F.batch_norm(y, m.mean, m.var),
    "gain alone": lambda m, y: F.batch_norm(y, m.mean, m.var, m.weight, eps=1e-2),
}


def closed_form(model):
    """The network, its simulation and its folded form agree; new statistics are those of the batch."""
    sim = quantize(model, X, FLOAT)
    with torch.no_grad():
        torch.testing.assert_close(sim(X), model(X))
        y = model.conv(X).transpose(0, 1).flatten(1)
    reestimate_bn_stats(sim, [X], 1)
    bn = sim.get_submodule(NAME)
    torch.testing.assert_close(bn.running_mean, y.mean(1))
    torch.testing.assert_close(bn.running_var, y.var(1))
    folded, report = fold_batch_norms(sim)
    torch.testing.assert_close(folded(X), sim(X), rtol=1e-4, atol=1e-5)
    return sim, report


@pytest.mark.parametrize("form", FORMS)
def test_a_call_with_the_networks_own_tensors_is_a_module_that_is_re_estimated_and_folded(form):
    model = Functional(FORMS[form]).eval()
    mean = model.mean.clone()
    sim, report = closed_form(model)
    assert report.folded == (("conv", NAME),) and report.kept == ()
    assert sim_report(sim).frozen_bns == (NAME,) and not sim.train().get_submodule(NAME).training
    assert torch.equal(model.mean, mean) and "mean" not in sim.state_dict()
    assert not any(name in ("mean", "var") for name, _ in sim_report(quantize(model, X)).unquantized)


def test_a_call_that_follows_the_mode_trains_as_it_did():
    model = Moving(None).eval()
    sim, report = closed_form(model)
    assert report.folded == (("conv", NAME),) and sim_report(sim).frozen_bns == ()
    sim = quantize(model, X, FLOAT)
    data = [(X, torch.arange(4)), (X * 3, torch.arange(4))]
    for network in (model, sim):
        torch.manual_seed(0)
        train(network, data, 2, lr=1e-3)
    bn = sim.get_submodule(NAME)
    torch.testing.assert_close(bn.running_mean, model.mean)
    torch.testing.assert_close(bn.running_var, model.var)


def test_a_call_in_evaluation_form_beside_others_that_follow_the_mode():
    sim = quantize(MixedModes(None).eval(), X)
    assert sim_report(sim).frozen_bns == (NAME,)


def test_a_module_of_ones_own_around_the_call_is_looked_into():
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3), OwnBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 1), OwnBatchNorm(8))
    )
    sim = quantize(model.eval(), X)
    calibrate(sim, [X], 1)
    reestimate_bn_stats(sim, [X], 1)
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("0", NAME), ("3", "batch_norm_1_module")) and report.kept == ()
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        torch.testing.assert_close(folded(X), sim(X), rtol=1e-3, atol=1e-4)


NAMED = {
    "computed": (lambda m, y: F.batch_norm(y, m.mean, m.var, m.weight.abs(), m.bias), "weight is computed"),
    "by the batch": (lambda m, y: F.batch_norm(y, m.mean * 1, m.var * 1, training=True), "each batch by its own"),
    "of the input": (lambda m, y: F.batch_norm(y, y.mean((0, 2, 3)), m.var), "running_mean is computed"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_call_with_other_tensors_is_named(name):
    forward, reason = NAMED[name]
    sim = quantize(Functional(forward).eval(), X)
    calibrate(sim, [X], 1)
    with pytest.raises(UserError, match="no batch norm with running statistics: .* calls batch norm as a function"):
        reestimate_bn_stats(sim, [X], 1)
    ((call, said),) = fold_batch_norms(sim)[1].kept
    assert call == "batch_norm" and reason in said and said.endswith("stays as it is")


def test_in_a_network_that_is_not_traced_such_calls_are_named():
    model = nn.Sequential(Functional(FORMS["F"]), nn.BatchNorm2d(8))
    assert reestimate_bn_stats(nn.Sequential(OwnBatchNorm(3), nn.BatchNorm2d(3)), [X], 1).functional == ("0",)
    with pytest.raises(UserError, match="0 calls batch norm as a function.*quantize"):
        reestimate_bn_stats(nn.Sequential(OwnBatchNorm(3)), [X], 1)
    assert reestimate_bn_stats(model, [X], 1).functional == ()  # what a function passed in calls is not seen


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.layer_norm(x, x.shape[1:]),
        lambda m, x: F.group_norm(x, 1),
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.local_response_norm(x, 2),
    ],
)
def test_other_normalizations_are_no_batch_norm(forward):
    sim = quantize(Net(lambda m, x: forward(m, m.conv(x)), conv=nn.Conv2d(3, 3, 1)).eval(), X)
    calibrate(sim, [X], 1)
    assert fold_batch_norms(sim)[1].kept == ()
    with pytest.raises(UserError, match="no module of it is one"):
        reestimate_bn_stats(sim, [X], 1)


REASONS = {
    "exported": (lambda: torch.export.export(nn.BatchNorm2d(3).eval(), (X,)).module(), "program of torch.export"),
    "script": (lambda: torch.jit.script(nn.BatchNorm2d(3)), "it is TorchScript"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "is lazy and has no statistics yet"),
    "none": (lambda: nn.Linear(3, 3), "no module of it is one"),
    "by the batch": (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "normalized by its own in 0"),
    "no module": (lambda: "resnet18", "expected a network, a torch.nn.Module, got str"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_there_is_nothing_to_re_estimate_is_true(name):
    make, reason = REASONS[name]
    with pytest.raises(UserError, match=reason):
        reestimate_bn_stats(make(), [X], 1)


def test_a_folded_network_is_told_from_one_without_batch_norm():
    sim = quantize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), X)
    calibrate(sim, [X], 1)
    with pytest.raises(UserError, match="it is folded already"):
        reestimate_bn_stats(fold_batch_norms(sim)[0], [X], 1)
