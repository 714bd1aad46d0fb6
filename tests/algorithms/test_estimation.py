"""Options of re-estimation against closed forms: prior, tolerance, passes, some layers, a curve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, UserError, bypassed, calibrate, quantize, reestimate_bn_stats
from bnre_exp.algorithms.observed import observed_statistics, self_consistency
from tests.networks import flat_cnn, randomize

torch.manual_seed(0)
PARTS = ((8, 1, 0), (5, 2, 1), (12, 0.5, -1), (7, 1, 3))
BATCHES = [torch.randn(size, 3, 8, 8) * scale + shift for size, scale, shift in PARTS]


def one_bn() -> nn.Sequential:
    bn = nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    return nn.Sequential(bn)


@pytest.mark.parametrize("method", ["batch_average", "pooled"])
@pytest.mark.parametrize("prior", [1, 32, 1e6])
def test_the_prior_weighs_old_statistics_as_so_many_samples(method, prior):
    plain, shrunk = one_bn(), one_bn()
    old = plain[0].running_mean.clone(), plain[0].running_var.clone()
    reestimate_bn_stats(plain, BATCHES, 4, method=method)
    handle = reestimate_bn_stats(shrunk, BATCHES, 4, method=method, prior=prior)
    weight = prior / (prior + 32)  # 8 + 5 + 12 + 7 samples
    assert handle.samples == 32
    for found, before, new in zip(
        (shrunk[0].running_mean, shrunk[0].running_var), old, (plain[0].running_mean, plain[0].running_var)
    ):
        torch.testing.assert_close(found, weight * before + (1 - weight) * new)
    handle.remove()
    assert torch.equal(shrunk[0].running_mean, old[0]) and torch.equal(shrunk[0].running_var, old[1])


def test_one_image_with_a_prior_stays_near_the_old_statistics():
    model = one_bn()
    handle = reestimate_bn_stats(model, [BATCHES[3][:1]], 1, prior=15)
    torch.testing.assert_close(
        model[0].running_mean, 15 / 16 * handle.before["0"][0] + BATCHES[3][:1].mean((0, 2, 3)) / 16
    )


def test_before_and_after_are_told_by_name():
    model = randomize(flat_cnn())
    before = {name: m.running_mean.clone() for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    handle = reestimate_bn_stats(model, BATCHES, 3)
    assert set(handle.before) == set(handle.after) == set(before)
    for name, (mean, var) in handle.after.items():
        assert torch.equal(mean, model.get_submodule(name).running_mean)
        assert torch.equal(var, model.get_submodule(name).running_var)
        assert torch.equal(handle.before[name][0], before[name])


def batches(count: int, size: int):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 3, 4, 4, generator=generator)


def test_tolerance_stops_where_the_errors_are_that_small():
    """Of 16 x 16 normal values a channel and batch, the mean's error is 1/16 and the variance's sqrt(2)/16 of one
    batch; after n batches these are divided by sqrt(n)."""
    model, given = one_bn(), list(batches(400, 16))
    handle = reestimate_bn_stats(model, given, 400, tolerance=0.02)
    expected = 2 / (16 * 0.02) ** 2  # about 20 batches, of which the worst of three channels needs more
    assert 0.6 * expected < handle.num_batches < 3 * expected
    assert handle.largest is not None and handle.largest[0] == "0" and handle.largest[1] <= 0.02
    same = one_bn()
    reestimate_bn_stats(same, given, handle.num_batches)
    assert torch.equal(same[0].running_mean, model[0].running_mean)
    short = reestimate_bn_stats(one_bn(), given, handle.num_batches - 1, tolerance=0.02)
    assert short.num_batches == handle.num_batches - 1 and short.largest[1] > 0.02
    assert reestimate_bn_stats(one_bn(), given, 10).largest is None


def test_the_layer_that_is_last_is_named():
    """The second of two BNs sees one value an image, the first 64."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    handle = reestimate_bn_stats(model, list(batches(300, 8)), 300, tolerance=0.05)
    assert handle.largest[0] == "2" and 50 < handle.num_batches < 300


def test_some_layers_alone():
    model = randomize(flat_cnn())
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = reestimate_bn_stats(model, BATCHES, 4, layers=[names[1]])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{names[1]}.running_mean", f"{names[1]}.running_var"} and set(handle.after) == {names[1]}
    others = randomize(flat_cnn())
    others.load_state_dict(before)
    found = observed_statistics(others, {others.get_submodule(names[1]): names[1]}, BATCHES, 4)
    (statistics,) = found.values()  # what it gets while all others compute with the statistics that they have
    for one, other in zip(statistics, handle.after[names[1]]):
        torch.testing.assert_close(one, other)
    handle.remove()
    assert set(reestimate_bn_stats(model, BATCHES, 1, layers=f"{names[0][0]}*").after) <= set(names)


def test_further_passes_make_statistics_consistent():
    """Every BN of a linear chain normalizes by what the ones before give; two passes settle a chain of two."""
    torch.manual_seed(3)
    model = randomize(flat_cnn()).double()
    data = [x.double() for x in BATCHES]
    bns = {m: name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}

    def inconsistency() -> float:
        used = {bn: (bn.running_mean, bn.running_var) for bn in bns}
        return self_consistency(used, observed_statistics(model, bns, data, 4))

    found = []
    for passes in (1, 2, len(bns) + 1):
        handle = reestimate_bn_stats(model, data, 4, passes=passes)
        found.append(inconsistency())
        handle.remove()
    assert found[0] > 1e-3 and found[1] < found[0] and found[2] < 1e-6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_bn_stats(model, data, 4, passes=3).remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_observed_statistics_are_those_of_the_inputs():
    model = one_bn()
    (found,) = observed_statistics(model, {model[0]: "0"}, BATCHES, 4, method="pooled").values()
    values = torch.cat(BATCHES).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[0], values.mean(1))
    torch.testing.assert_close(found[1], values.var(1))
    used = {model[0]: (found[0] + 2 * found[1].sqrt(), found[1])}
    assert self_consistency(used, {model[0]: found}) == pytest.approx(2, rel=1e-4)


def test_of_a_constant_channel_consistency_is_what_the_batch_norm_makes_of_it():
    bn = nn.BatchNorm2d(2, eps=1e-4)
    used = {bn: (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))}
    observed = {bn: (torch.tensor([0.01, 1.0]), torch.tensor([0.0, 0.0]))}
    assert self_consistency(used, observed) == pytest.approx(1 / 2**0.5, rel=1e-5)  # 0.01 / sqrt(1e-4), and 0


def test_a_curve_is_measured_with_the_statistics_so_far():
    model = one_bn()
    old = model[0].running_mean.clone()
    handle = reestimate_bn_stats(model, BATCHES, 4, curve=[1, 3, 9], measure=lambda: model[0].running_mean.clone())
    assert [count for count, _ in handle.curve] == [1, 3]
    for count, mean in handle.curve:
        alone = one_bn()
        reestimate_bn_stats(alone, BATCHES, count)
        assert torch.equal(mean, alone[0].running_mean)
    whole = one_bn()
    reestimate_bn_stats(whole, BATCHES, 4)
    assert torch.equal(model[0].running_mean, whole[0].running_mean)
    handle.remove()
    assert torch.equal(model[0].running_mean, old)


def test_a_measurement_that_fails_leaves_the_old_statistics():
    model = one_bn()
    old = model[0].running_mean.clone()
    with pytest.raises(ZeroDivisionError):
        reestimate_bn_stats(model, BATCHES, 4, curve=[2], measure=lambda: 1 / 0)
    assert torch.equal(model[0].running_mean, old)


def test_options_work_together_on_a_simulation():
    sim = quantize(randomize(flat_cnn()).eval(), BATCHES[0], QuantScheme(weight_bits=3))
    calibrate(sim, BATCHES, 2)
    with bypassed(sim):
        handle = reestimate_bn_stats(
            sim, BATCHES, 12, method="pooled", tolerance=1e-9, prior=4, passes=2, curve=[2], measure=lambda: 7
        )
    assert handle.num_batches == 12 and handle.loader_passes == 3 and handle.curve == ((2, 7),)
    assert handle.largest is not None and handle.largest[1] > 1e-9 and handle.samples == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0}, "tolerance=0: expected a number above 0"),
        ({"tolerance": math.inf}, "tolerance=inf"),
        ({"tolerance": 0.1, "method": "ema"}, "method=ema forgets"),
        ({"prior": -1}, "prior=-1: expected a number of samples"),
        ({"passes": 0}, "passes=0: expected at least 1"),
        ({"passes": 1.5}, "passes=1.5: expected at least 1"),
        ({"curve": [0]}, r"curve=\[0\]: expected numbers of batches"),
        ({"layers": "nothing*"}, "layers=nothing\\*: no batch norm of the model has such a name; it has 0"),
        ({"layers": []}, r"layers=\[\]: no batch norm"),
    ],
)
def test_options_out_of_their_range(options, message):
    model = one_bn()
    old = model[0].running_mean.clone()
    with pytest.raises(UserError, match=message):
        reestimate_bn_stats(model, BATCHES, 2, **options)
    assert torch.equal(model[0].running_mean, old)
