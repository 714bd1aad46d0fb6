"""Networks that are compiled, or computed in bfloat16, give what they give otherwise, within stated tolerances."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, UserError, calibrate, evaluate, quantize, reestimate_bn_stats, train
from bnre_exp.algorithms import evaluate as evaluation
from bnre_exp.algorithms import speed
from tests.networks import flat_cnn

torch.manual_seed(0)
LABELS = torch.arange(24) % 10
# Class by class another mean, so that accuracies mean something; the last batch is shorter.
SAMPLES = torch.randn(10, 3, 8, 8)[LABELS] + torch.randn(24, 3, 8, 8) * 0.3
BATCHES = [(SAMPLES[:10], LABELS[:10]), (SAMPLES[10:20], LABELS[10:20]), (SAMPLES[20:], LABELS[20:])]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = flat_cnn()
    train(model, BATCHES[:2], 30, lr=0.05)
    return model


def simulation(model: nn.Module):
    sim = quantize(model, SAMPLES[:2], QuantScheme(4, 8))
    calibrate(sim, BATCHES, 3)
    return sim


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def test_bfloat16_keeps_statistics_and_predictions_within_its_rounding(trained):
    sim, other = simulation(trained), simulation(trained)
    exact, rounded = evaluate(sim, BATCHES), evaluate(sim, BATCHES, precision="bfloat16")
    assert exact.metrics["top1"] > 0.5
    assert abs(exact.metrics["top1"] - rounded.metrics["top1"]) <= 2 / 24 + 1e-9
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert rounded.metrics["loss"] != exact.metrics["loss"]
    reestimate_bn_stats(sim, BATCHES, 6)
    reestimate_bn_stats(other, BATCHES, 6, precision="bfloat16")
    ours, theirs = statistics(other), statistics(sim)
    for name in ours:
        assert ours[name].dtype == torch.float32
        spread = theirs[name.replace("running_mean", "running_var")].sqrt()  # of a mean; variances by themselves
        scale = spread if name.endswith("mean") else theirs[name] + 1e-5
        assert float(((ours[name] - theirs[name]).abs() / scale).max()) < 0.05, name
        assert not torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("function", [evaluate, lambda *args, **more: reestimate_bn_stats(*args, 1, **more)])
def test_an_unknown_precision_is_refused(function, trained):
    with pytest.raises(UserError, match="precision='half': expected one of float32, bfloat16"):
        function(trained, BATCHES, precision="half")


def test_where_nothing_can_be_compiled_it_is_said(monkeypatch, trained):
    def without_a_compiler(function):
        raise RuntimeError("No working C++ compiler found\nand more")

    speed.check_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    expected = r"compile=true: .* needs a C\+\+ compiler .*apt-get install g\+\+.*No working C\+\+ compiler found\)"
    with pytest.raises(UserError, match=expected):
        evaluate(trained, BATCHES, compile=True)
    speed.check_compiler.cache_clear()


@pytest.mark.slow
def test_compiled_networks_compute_the_same(trained):
    calls = []
    sim, other = simulation(trained), simulation(trained)
    plain, fast = evaluate(sim, BATCHES), evaluate(sim, BATCHES, compile=True)
    assert torch.equal(plain.predictions, fast.predictions)
    assert fast.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    again = evaluate(sim, BATCHES, compile=True)
    assert again.metrics == fast.metrics
    assert len(speed._compiled[sim]) == 1  # what was compiled is kept, and other shapes are not compiled
    sim.register_forward_hook(lambda *_: calls.append(1))
    evaluate(sim, BATCHES, compile=True)
    assert len(calls) == 3  # hooks count as ever

    for method in ("batch_average", "pooled"):
        with reestimate_bn_stats(sim, BATCHES, 7, method=method) as handle:
            expected, unreached = statistics(sim), handle.unreached
        with reestimate_bn_stats(sim, BATCHES, 7, method=method, compile=True) as handle:
            assert handle.unreached == unreached
            for name, value in statistics(sim).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    kept = len(speed._compiled[sim])
    with reestimate_bn_stats(sim, BATCHES, 3, compile=True):
        assert len(speed._compiled[sim]) == kept  # nothing is compiled again

    histories = [
        train(network, BATCHES, 2, lr=0.01, compile=is_compiled, validation=BATCHES)
        for network, is_compiled in ((copy.deepcopy(other), False), (copy.deepcopy(other), True))
    ]
    for ours, theirs in zip(*histories):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert ours.validation["loss"] == pytest.approx(theirs.validation["loss"], rel=1e-2)


@pytest.mark.parametrize("bad", [0, 2, 3, 4])
def test_a_device_that_answers_slowly_is_asked_seldom_and_the_batch_is_named_all_the_same(monkeypatch, trained, bad):
    monkeypatch.setattr(evaluation, "patience", lambda device: 3)
    batches = [(x.clone(), y) for x, y in [*BATCHES, *BATCHES[:2]]]
    expected = evaluate(trained, batches)
    assert expected.count == 44
    batches[bad][0][1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=rf"batch {bad + 1}: .*\(10 of \d+ numbers\); the batch holds NaN or infinity"):
        evaluate(trained, batches)
