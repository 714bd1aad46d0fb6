"""Networks that compute something else in training mode: a graph each, over the same modules and quantizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp import (
    QuantScheme,
    UserError,
    calibrate,
    fold_batch_norms,
    load_folded,
    quantize,
    reestimate_bn_stats,
    save_folded,
    sim_report,
    train,
    weight_quantizers,
)
from bnre_exp.quantsim.insert import quantize_again, rebuild_sim
from bnre_exp.quantsim.nodes import module_of
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from tests.networks import Net, randomize

FLOAT = QuantScheme(weight_bits=None, act_bits=None)
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def parts(**more):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), "late": nn.Conv2d(3, 4, 1), **more}


def softmax_at_the_end(m, x):
    y = m.late(m.bn(m.conv(x)).relu()).mean((2, 3))
    return y if m.training else y.softmax(1)


def scaled_within(m, x):
    y = m.bn(m.conv(x))
    return m.late(y * 2 if m.training else y)


def noise(m, x):
    y = m.bn(m.conv(x))
    return m.late(y + torch.randn_like(y) if m.training else y)


def drop_connect(y, training):
    if not training:
        return y
    kept = torch.floor(torch.rand([y.shape[0], 1, 1, 1]) + 0.8)
    return y / 0.8 * kept


def dropped_path(m, x):
    return m.late(drop_connect(m.bn(m.conv(x)), m.training) + x)


def features_in_training(m, x):
    y = m.bn(m.conv(x))
    outputs = [m.late(y), m.late(y[:, :, ::2])]
    return {"features": outputs} if m.training else torch.cat([o.flatten(2) for o in outputs], 2).sigmoid()


def deep_supervision(m, x):
    y = m.bn(m.conv(x))
    return torch.stack([m.late(y), m.extra(y)], 1) if m.training else m.late(y)


def sampled(m, x):
    mean, spread = m.bn(m.conv(x)), m.extra(x)
    return m.late(mean + spread.exp() * torch.randn_like(mean) if m.training else mean)


def functional_dropout_and_a_constant(m, x):
    y = F.dropout(m.bn(m.conv(x)), 0.5, m.training)
    return m.late(y + torch.full((3, 1, 1), 0.5)) * (torch.arange(4.0).view(4, 1, 1) if m.training else 1.5)


KINDS = [
    softmax_at_the_end, scaled_within, noise, dropped_path, features_in_training, deep_supervision, sampled,
    functional_dropout_and_a_constant,
]  # fmt: skip


def network(forward):
    extra = nn.Conv2d(3, 4 if forward is deep_supervision else 3, 1)
    return randomize(Net(forward, **parts(extra=extra))).eval()


def outputs(model, x, training):
    model.train(training)
    torch.manual_seed(3)
    return model(x)


@pytest.mark.parametrize("forward", KINDS)
def test_each_mode_does_what_the_network_does_in_it(forward, tmp_path):
    model = network(forward)
    sim = quantize(model, X, FLOAT)
    report = sim_report(sim)
    assert report.modes == "both" and "training mode has a graph of its own" in report.notes[0]
    for each in (sim, copy.deepcopy(sim)):
        for training in (True, False, True):
            for batch in (2, 5):
                x = torch.randn(batch, 3, 12, 12)
                original = copy.deepcopy(model)  # BN statistics move in training
                torch.testing.assert_close(
                    outputs(copy.deepcopy(each), x, training), outputs(original, x, training), rtol=1e-4, atol=1e-4
                )
    folded, found = fold_batch_norms(sim)
    assert found.folded == (("conv", "bn"),)
    torch.testing.assert_close(folded(X), outputs(model, X, False), rtol=1e-4, atol=1e-4)
    save_folded(folded, tmp_path / "folded")
    torch.testing.assert_close(load_folded(tmp_path / "folded")(X), folded(X), rtol=0, atol=0)


@pytest.mark.parametrize("forward", KINDS)
def test_both_modes_quantize_the_same_tensors(forward):
    """All that training computes as evaluation does is quantized by the very same quantizer."""
    sim = quantize(network(forward), X, QuantScheme(4, 8))
    used = [
        {str(node.target) for node in graph.nodes if isinstance(module_of(node), ActivationQuantizer)}
        for graph in sim.graphs
    ]
    assert used[0] == used[1] == {name for name, m in sim.named_modules() if isinstance(m, ActivationQuantizer)}


def test_a_sum_is_quantized_though_a_path_to_it_is_dropped_in_training():
    sim = quantize(network(dropped_path), X, QuantScheme(4, 8))
    evaluation, training = (
        [module_of(node) for node in graph.nodes if isinstance(module_of(node), ActivationQuantizer)]
        for graph in sim.graphs
    )
    assert evaluation == training and len(evaluation) == 4  # input, BN, sum, last conv


def test_what_evaluation_makes_of_the_outputs_stays_float():
    reason = "computed in evaluation mode only, of what the network gives in training mode; stays float"
    for forward, name in ((softmax_at_the_end, "softmax"), (features_in_training, "sigmoid")):
        sim = quantize(network(forward), X, QuantScheme(4, 8))
        assert (name, reason) in sim_report(sim).unquantized
        assert list(weight_quantizers(sim)) == ["conv", "late"]
        calibrate(sim, [X], 1)
        (output,) = sim.graph.find_nodes(op="output")
        assert not isinstance(module_of(output.args[0]), ActivationQuantizer)


def test_only_what_the_note_says_differs():
    notes = sim_report(quantize(network(scaled_within), X)).notes
    assert notes == (
        "training mode has a graph of its own: the network's own forward, which computes mul in training mode only",
    )

    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if self.training and x.shape[0] else x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.branch = nn.Conv2d(3, 3, 1), Branch()

        def forward(self, x):
            return self.conv(x) - 1 if self.training else self.conv(x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Block())
    assert "the module '2' (Block), which computes sub in training mode" in sim_report(quantize(model, X)).notes[0]


@pytest.mark.parametrize("forward", [dropped_path, softmax_at_the_end])
def test_trained_reestimated_and_folded(forward):
    model = network(forward)
    sim = quantize(model, X, QuantScheme(4, 8))
    calibrate(sim, [X], 1)
    before = {name: q.scale.clone() for name, q in weight_quantizers(sim).items()}
    labels = torch.zeros(4, 12, 12, dtype=torch.int64) if forward is dropped_path else torch.zeros(4, dtype=torch.int64)
    (epoch,) = train(sim, [(X, labels)], 1, lr=0.01)
    assert all(not torch.equal(q.scale, before[name]) for name, q in weight_quantizers(sim).items())
    mean = sim.bn.running_mean.clone()
    reestimate_bn_stats(sim, [X], 1)
    assert not torch.equal(sim.bn.running_mean, mean)
    folded, _ = fold_batch_norms(sim)
    torch.testing.assert_close(folded(X), sim(X), rtol=1e-4, atol=1e-4)


def fails_in_training(m, x):
    if m.training:
        raise ValueError("targets are needed")
    return m.late(m.bn(m.conv(x)))


def values_decide_in_training(m, x):
    y = m.bn(m.conv(x))
    if m.training and y.abs().sum() > 0:
        y = y * 2
    return m.late(y)


@pytest.mark.parametrize("forward", [fails_in_training, values_decide_in_training])
def test_without_a_training_mode_the_network_is_taken_for_evaluation_alone(forward):
    model = network(forward)
    with pytest.raises(UserError, match=r'(?s)In training mode.*modes="eval"'):
        quantize(model, X)
    with pytest.raises(UserError, match="modes='train': expected"):
        quantize(model, X, modes="train")
    sim = quantize(model, X, QuantScheme(4, 8), modes="eval")
    assert sim_report(sim).modes == "eval" and "taken for evaluation alone" in sim_report(sim).notes[0]
    calibrate(sim, [X], 1)
    reestimate_bn_stats(sim, [X], 1)
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("conv", "bn"),)
    for call in (sim.train, copy.deepcopy(sim).train, lambda: train(sim, [(X, torch.zeros(4))], 1)):
        with pytest.raises(UserError, match="for evaluation alone"):
            call()
    assert not sim.training and not sim.bn.training


def test_evaluation_alone_is_no_less_where_both_modes_can_be_traced():
    for forward, modes in ((noise, "both"), (lambda m, x: m.late(m.bn(m.conv(x))), "same")):
        sim = quantize(network(forward), X, modes="eval")
        assert sim_report(sim).modes == modes and sim.train().training


@pytest.mark.parametrize("forward", [noise, lambda m, x: m.late(m.bn(m.conv(x))), fails_in_training])
def test_a_simulation_is_made_again_in_the_modes_it_had(forward):
    model, scheme = network(forward), QuantScheme(4, 8)
    sim = quantize(model, X, scheme, modes="eval")
    calibrate(sim, [X], 1)
    report = sim_report(sim)
    again = [rebuild_sim(model, X, scheme, modes=report.modes), quantize_again(model, X, scheme, report)]
    for other in again:
        other.load_state_dict(sim.state_dict())
        assert sim_report(other).modes == report.modes
        for training in (False,) if report.modes == "eval" else (False, True):
            pair = copy.deepcopy(sim), copy.deepcopy(other)
            torch.testing.assert_close(*(outputs(each, X, training) for each in pair), rtol=0, atol=0)
    assert sim_report(again[1]) == report


def test_batch_norm_as_a_function_in_a_network_of_two_modes_is_refused():
    def forward(m, x):
        y = F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, training=m.training)
        return m.late(y * 2 if m.training else y)

    with pytest.raises(UserError, match="calls batch norm as a function"):
        quantize(network(forward), X)
