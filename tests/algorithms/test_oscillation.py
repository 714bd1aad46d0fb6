"""Frequencies of oscillating weights, dampening and freezing, against the formulas of the paper."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bnre_exp import (
    QuantScheme,
    UserError,
    calibrate,
    fold_batch_norms,
    quantize,
    track_oscillations,
    train,
    weight_quantizers,
)
from bnre_exp.algorithms.oscillation import annealed, dampening_gradient, follow
from bnre_exp.quantsim.quantizers.fake_quantize import positive
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn, randomize

DATA = labelled((16,) * 6)


def simulation(bits: int = 3, seed: int = 0, model: nn.Module | None = None, gammas: str = "one", **scheme):
    """gammas: of the network that DATA are for, "one" or of "either" sign."""
    torch.manual_seed(seed)
    x, flat = DATA[0][0] if model is None else torch.randn(4, 4, 6, 6), flat_cnn()
    model = model or (randomize(flat) if gammas == "either" else flat)
    sim = quantize(model, x, QuantScheme(weight_bits=bits, act_bits=8, **scheme))
    calibrate(sim, [x], 1)
    return sim


def latent(sim: nn.Module, name: str) -> nn.Parameter:
    return sim.get_submodule(name).parametrizations.weight.original


def codes(sim: nn.Module) -> torch.Tensor:
    return torch.cat([q.codes(latent(sim, n)).flatten().int() for n, q in weight_quantizers(sim).items()])


def follow_all(sequence: list[int], momentum: float) -> list[float]:
    before, direction = torch.tensor([sequence[0]], dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    frequency, found = torch.zeros(1, dtype=torch.float64), []
    for number in sequence[1:]:
        now = torch.tensor([number], dtype=torch.int8)
        follow(now, before, direction, frequency, momentum)
        before.copy_(now)
        found.append(float(frequency))
    return found


M = 0.1


@pytest.mark.parametrize(
    ("sequence", "oscillates"),
    [
        ([0, 1, 0, 1], [0, 1, 1]),  # the first change is against none
        ([0, 1, 2, 3], [0, 0, 0]),  # onwards
        ([0, 1, 1, 1, 0], [0, 0, 0, 1]),  # the last change counts, however long ago it was
        ([0, 1, 0, 0, -1, -1, 1], [0, 1, 0, 0, 0, 1]),
        ([3, 3, 3], [0, 0]),
        ([2, -2, 2], [0, 1]),  # by several integers at once
    ],
)
def test_the_frequency_is_the_moving_average_of_changes_against_the_change_before(sequence, oscillates):
    expected, frequency = [], 0.0
    for one in oscillates:
        frequency = M * one + (1 - M) * frequency
        expected.append(frequency)
    assert follow_all(sequence, M) == pytest.approx(expected, abs=1e-12)


def test_a_weight_that_oscillates_in_every_step_has_the_closed_form():
    found = follow_all([0, 1] * 20, M)  # the first of 39 steps is no oscillation
    assert found[-1] == pytest.approx(1 - (1 - M) ** 38)


@pytest.mark.parametrize("grid", ["narrow", "full"])
@pytest.mark.parametrize("bits", [2, 7, 8, 9, 16])
def test_a_change_across_the_whole_range_has_its_direction(bits, grid):
    sim = simulation(bits, weight_grid=grid)
    watch, weight = track_oscillations(sim), latent(sim, "0")
    with torch.no_grad():
        for value in (-1e9, 1e9, -1e9):
            weight.fill_(value)
            watch.after_step(1.0)
    layer = watch.layers[0]
    ends = layer.of(watch.state["codes"]), layer.of(watch.state["direction"]), layer.of(watch.state["frequency"])
    assert (
        (ends[0] == -(2 ** (bits - 1)) + (grid == "narrow")).all()
        and (ends[1] == -1).all()
        and (ends[2] > 0.0099).all()
    )
    others = watch.layers[1].of(watch.state["frequency"])
    assert not others.any() and sum(row.oscillating for row in watch.by_layer()) == 1.0


def test_what_is_followed_are_the_codes_in_the_layout_of_the_weight():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    sim = simulation(model=randomize(model).to(memory_format=torch.channels_last))
    watch = track_oscillations(sim)
    with torch.no_grad():
        latent(sim, "2")[3, 2, 1, 0] += 10  # clipped: one weight changes by one code or more, none other
    before = {layer.name: layer.of(watch.state["codes"]).clone() for layer in watch.layers}
    watch.after_step(1.0)
    for layer in watch.layers:
        found = layer.of(watch.state["codes"])
        assert torch.equal(found.int(), layer.quantizer.codes(layer.weight).int())
        changed = (found != before[layer.name]).nonzero().tolist()
        assert changed == ([[3, 2, 1, 0]] if layer.name == "2" else [])
    assert [name for name in watch.tensors if name.endswith("/2")] == ["codes/2", "direction/2", "frequency/2"]


def test_only_following_changes_no_bit_of_a_training():
    first, second = simulation(), simulation()
    plain = train(first, DATA, 3, lr=0.02, validation=DATA)
    watched = train(second, DATA, 3, lr=0.02, validation=DATA, oscillations=track_oscillations(second))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert [e.loss for e in plain] == [e.loss for e in watched] and plain[-1].validation == watched[-1].validation
    assert plain[-1].shares is None and set(watched[-1].shares or {}) == {"oscillating"}


def grouped() -> nn.Module:
    return randomize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))


def chain() -> nn.Module:
    """With gammas of either sign: on the full grid some channels are mirrored."""
    return randomize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)))


def ends(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest code of each channel, as the grids are described."""
    quantizer = layer.quantizer
    half, is_mirrored = 2 ** (quantizer.bits - 1), quantizer.mirrored.float()
    low = -half + is_mirrored if quantizer.full_grid else torch.full_like(is_mirrored, 1 - half)
    return quantizer.layout.expand(low), quantizer.layout.expand(half - 1 + is_mirrored)


SCHEMES = {
    "per channel": {}, "per tensor": {"per_channel": False}, "full grid": {"weight_grid": "full"},
    "full grid per tensor": {"weight_grid": "full", "per_channel": False},
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("build", [None, chain, grouped], ids=["flat", "chain", "transposed in groups"])
def test_the_gradient_of_dampening_is_that_of_its_formula_and_reaches_latent_weights_alone(build, scheme):
    sim = simulation(model=build and build(), **scheme)
    watch = track_oscillations(sim, method="dampening", dampening=0.3)
    with torch.no_grad():
        for layer in watch.layers:
            layer.weight.mul_(3)  # so that some lie outside of the range
            layer.quantizer.scale[0].neg_()  # what training may do; its magnitude counts
    for layer in watch.layers:
        w, s = layer.weight.detach().clone().requires_grad_(), layer.scale().detach()
        low, high = ends(layer)
        quantized = torch.minimum(torch.maximum((w / s).round(), low), high) * s
        loss = (quantized.detach() - torch.minimum(torch.maximum(w, low * s), high * s)).square().sum() * 0.3
        (expected,) = torch.autograd.grad(loss, w)
        assert (w > high * s).any() and (w < low * s).any() and expected.any()
        is_mixed = build is not None and len(layer.quantizer.scale) > 1 and layer.name == "0"
        assert bool(layer.quantizer.mirrored.any()) == (is_mixed and layer.quantizer.full_grid)
        torch.testing.assert_close(dampening_gradient(layer.quantizer, layer.weight, 0.3), expected)
        layer.weight.grad = torch.ones_like(layer.weight)
    watch.before_step(1.0)  # at the end of the training: the whole strength
    for layer in watch.layers:
        torch.testing.assert_close(layer.weight.grad, 1 + dampening_gradient(layer.quantizer, layer.weight, 0.3))
        assert layer.quantizer.scale.grad is None
    latent(sim, "0").grad = None
    watch.before_step(0.5)
    halfway = dampening_gradient(watch.layers[0].quantizer, watch.layers[0].weight, 0.15)
    torch.testing.assert_close(latent(sim, "0").grad, halfway)


def test_schedules_go_from_one_value_to_the_other_by_a_cosine():
    assert annealed(0.1, 0.01, 0.0) == pytest.approx(0.1) and annealed(0.1, 0.01, 1.0) == pytest.approx(0.01)
    assert annealed(0.0, 1.0, 0.25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_a_weight_is_frozen_at_the_rounded_average_of_its_integers_once_its_frequency_exceeds_the_threshold():
    sim = simulation()
    watch = track_oscillations(sim, method="freezing", momentum=M, freeze_from=0.15, freeze_to=0.15)
    layer = watch.layers[0]
    where, scale = (0, 0, 0, 0), float(layer.scale().detach()[0])
    with torch.no_grad():
        layer.weight[where] = 2 * scale
    layer.of(watch.state["codes"])[where], layer.of(watch.state["average"])[where] = 2, 2.0
    frozen, average, frequency = [], 2.0, 0.0
    for step, code in enumerate([3, 2, 3, 2]):
        with torch.no_grad():
            layer.weight[where] = code * scale + 0.2 * scale
        watch.after_step(1.0)
        frequency = M * (step > 0) + (1 - M) * frequency
        frozen.append(int(layer.of(watch.state["frozen"])[where]))
        if not frozen[-1]:
            average += M * (code - average)
            assert float(layer.of(watch.state["average"])[where]) == pytest.approx(average)
    assert frozen == [0, 0, 1, 1] and watch.state["frozen"].sum() == 1  # 0.19 after the third step
    assert int(layer.of(watch.state["codes"])[where]) == round(average) == 2  # though it was 3 in that step
    assert float(layer.weight[where].detach()) == pytest.approx(2 * scale)


@pytest.mark.parametrize("grid", ["narrow", "full"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_weights_keep_their_integers_through_training_weight_decay_and_moving_scales(optimizer, grid):
    sim, seen = simulation(gammas="one" if grid == "narrow" else "either", weight_grid=grid), []
    watch = track_oscillations(sim, method="freezing", freeze_from=0.02, freeze_to=0.005)
    scales = {name: q.scale.detach().clone() for name, q in weight_quantizers(sim).items()}

    def remember(epoch):
        frozen = torch.cat([layer.of(watch.state["frozen"]).flatten() for layer in watch.layers]).bool()
        seen.append((frozen, codes(sim)))

    lr = 0.03 if optimizer == "sgd" else 0.005
    how = {"lr": lr, "optimizer": optimizer, "weight_decay": 0.1, "on_epoch": remember, "ema_decay": 0.9}
    history = train(sim, DATA, 25, oscillations=watch, **how)
    seen.append((seen[-1][0], codes(sim)))  # of the average, in whose place scales are others
    counts = [int(frozen.sum()) for frozen, _ in seen]
    assert counts == sorted(counts) and 0 < counts[12] < counts[-1] < len(seen[-1][0])
    for (frozen, then), (_, later) in zip(seen, seen[1:]):
        assert torch.equal(then[frozen], later[frozen])
    assert (seen[0][1] != seen[-1][1]).any()
    assert not any(torch.equal(q.scale, scales[name]) for name, q in weight_quantizers(sim).items())
    assert history[-1].shares["frozen"] == pytest.approx(counts[-1] / len(seen[-1][0]))


@torch.no_grad()
def test_a_weight_is_frozen_at_the_end_of_a_mirrored_grid_and_folded_there():
    """At 4 with 3 bits, the code that only the mirrored grid has, while the scale goes on changing."""
    sim = simulation(model=chain(), weight_grid="full")
    channel, scale = int(sim.get_submodule("1").weight.argmin()), weight_quantizers(sim)["0"].scale
    where = (channel, 0, 0, 0)
    latent(sim, "0")[where] = 9.0 * scale[channel]  # beyond the end
    watch = track_oscillations(sim, method="freezing", momentum=0.5, freeze_from=0.4, freeze_to=0.4)
    layer = watch.layers[0]
    for code in (3.2, 9.0, 9.0, 9.0):  # to 3 and back to 4: one oscillation, of a frequency of 0.5
        layer.weight[where] = code * scale[channel]
        watch.after_step(1.0)
    assert watch.state["frozen"].sum() == 1 and layer.of(watch.state["frozen"])[where] == 1
    for factor in (1.1, 0.7, -1.3):  # a learned scale may change its sign; its magnitude counts
        scale.mul_(factor)
        layer.weight.sub_(0.01 * layer.weight.sign())  # what an optimizer might do
        watch.after_step(1.0)
        assert float(layer.weight[where]) == pytest.approx(4 * float(scale[channel].abs()), rel=1e-6)
        assert int(layer.quantizer.codes(layer.weight)[where]) == 4
    folded, report = fold_batch_norms(sim)
    assert report.lossy == () and int(folded.get_submodule("0").parametrizations.weight.original[where]) == -4


@pytest.mark.parametrize("grid", ["narrow", "full"])
def test_the_integers_of_frozen_weights_are_those_that_are_folded(grid):
    sim = simulation(gammas="either", weight_grid=grid)
    watch = track_oscillations(sim, method="freezing", freeze_from=0.02, freeze_to=0.005)
    train(sim, DATA, 15, lr=0.03, oscillations=watch, weight_decay=0.01)
    folded, _ = fold_batch_norms(sim)
    for layer, bn in zip(watch.layers, ("1", "4", "7", None)):
        frozen = layer.of(watch.state["frozen"]).bool()
        sign = 1 if bn is None else layer.quantizer.layout.expand(sim.get_submodule(bn).weight.sign()).int()
        wanted = (layer.of(watch.state["codes"]).int() * sign).clamp(-4, 3)
        found = folded.get_submodule(layer.name).parametrizations.weight.original.int()
        assert torch.equal(found[frozen], wanted[frozen])
    assert sum(row.frozen > 0 for row in watch.by_layer()) >= 2


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_weights_that_are_not_trained_stand_still_whatever_their_scale_does(ema_decay):
    """Their scale is trained, so that their integers change; a weight that its user froze is not to be moved."""
    sim = simulation(2)
    latent(sim, "3").requires_grad_(False)
    before = latent(sim, "3").detach().clone()
    watch = track_oscillations(sim, method="freezing", momentum=0.2, freeze_from=0.05, freeze_to=0.0)
    start = watch.layers[1].of(watch.state["codes"]).clone()
    train(sim, DATA, 15, lr=0.05, oscillations=watch, validation=DATA, ema_decay=ema_decay)
    assert torch.equal(latent(sim, "3"), before)
    assert (watch.layers[1].quantizer.codes(before) != start).any()
    rows = {row.layer: row for row in watch.by_layer()}
    assert rows["3"].frozen == rows["3"].oscillating == 0.0 and rows["0"].frozen > 0


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("build", [None, chain, grouped], ids=["flat", "chain", "transposed in groups"])
def test_a_scale_has_the_gradient_of_integer_times_scale_for_frozen_weights(build, scheme):
    sim = simulation(model=build and build(), **scheme)
    watch = track_oscillations(sim, method="freezing")
    torch.manual_seed(1)
    watch.state["frozen"].bernoulli_(0.5)
    for layer in watch.layers:  # among them weights at both ends of the range, where a weight is not clipped yet
        low, high = (end.expand_as(layer.weight).flatten().to(watch.state["codes"].dtype) for end in ends(layer))
        part = layer.of(watch.state["codes"]).view(-1)
        part[::7], part[3::7] = low[::7], high[3::7]
    for layer in watch.layers:
        layer.quantizer.scale.data[0].neg_()
    watch.hold()
    expected = []
    for layer in watch.layers:
        quantizer, weight = layer.quantizer, layer.weight
        upstream, frozen = torch.randn_like(weight), layer.of(watch.state["frozen"]).bool()
        (quantizer(weight) * upstream).sum().backward()
        # Frozen weights are constants times the scale; the others are rounded, whose gradient is LSQ's.
        scale, others = quantizer.scale.detach().clone().requires_grad_(), copy.deepcopy(quantizer)
        held = layer.of(watch.state["codes"]).float() * quantizer.layout.expand(positive(scale))
        (held * upstream * frozen).sum().mul(quantizer.gradient_scale(weight)).backward()
        others.scale.grad = None
        (others(weight.detach()) * upstream * ~frozen).sum().backward()
        expected.append(scale.grad + others.scale.grad)
        assert not torch.allclose(quantizer.scale.grad, expected[-1], rtol=1e-2)
    watch.before_step(1.0)
    for layer, gradient in zip(watch.layers, expected):
        torch.testing.assert_close(layer.quantizer.scale.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "how"), [("freezing", {"freeze_from": 0.05}), ("dampening", {"dampening": 1.0})], ids=lambda x: str(x)
)
def test_fewer_weights_oscillate_at_the_end_of_a_training_that_freezes_or_dampens(method, how):
    shares = {}
    for name, options in (("none", {}), (method, how)):
        sim = simulation()
        watch = track_oscillations(sim, method=name, **options)
        history = train(sim, DATA, 40, lr=0.02, schedule="constant", oscillations=watch)
        shares[name] = history[-1].shares["oscillating"]
        assert history[-1].loss < history[0].loss / 2
        often = (watch.state["frequency"] > 0.005).float().mean()  # with those frozen, whose frequency decays
        shares[f"{name}, frozen as well"] = float(often)
    assert shares["none"] > 0.2 and shares[method] < shares["none"] / 2
    assert shares["none, frozen as well"] == pytest.approx(shares["none"])


def test_it_is_asked_once_a_step_in_order_and_told_how_far_the_training_is():
    calls = []

    class Recorder:
        tensors, settings, needs_end = {}, {}, True

        def before_step(self, progress):
            assert all(p.grad is not None for p in model.parameters())
            calls.append(("before", progress, model[0].weight.detach().clone()))

        def after_step(self, progress):
            calls.append(("after", progress, model[0].weight.detach().clone()))

        def hold(self):
            calls.append(("hold", None, None))

        def shares(self):
            return {"oscillating": 0.5}

    model = flat_cnn()
    history = train(model, DATA, 2, validation=DATA, oscillations=Recorder())
    steps = len(DATA) * 2
    expected = [(name, pytest.approx(step / steps)) for step in range(1, steps + 1) for name in ("before", "after")]
    assert [call[:2] for call in calls] == expected
    assert not any(torch.equal(calls[i][2], calls[i + 1][2]) for i in range(0, len(calls), 2))
    assert history[0].shares == {"oscillating": 0.5}
    assert type(history[0]).from_json(history[0].as_json()) == history[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "freeze"}, "method='freeze'"),
        ({"momentum": 0.0}, r"momentum=0\.0"),
        ({"dampening": -1}, "dampening=-1"),
        ({"freeze_to": 1.5}, r"freeze_to=1\.5"),
        ({"freeze_from": True}, "freeze_from=True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        track_oscillations(simulation(), **arguments)


def test_a_network_without_quantized_weights_and_a_loader_without_a_length_are_refused():
    with pytest.raises(UserError, match="no weights of this network are quantized"):
        track_oscillations(flat_cnn())
    sim = simulation()
    watch = track_oscillations(sim, method="dampening")
    endless = (batch for _ in range(9) for batch in DATA)
    with pytest.raises(UserError, match="no length, which the schedule of oscillations= needs"):
        train(sim, endless, 1, schedule="constant", oscillations=watch)
    train(sim, DATA, 1, schedule="constant", steps_per_epoch=3, oscillations=watch)


class Claims(list):
    """A loader that yields fewer batches than it says."""

    def __len__(self) -> int:
        return 2 * super().__len__()


def test_a_schedule_goes_by_a_length_that_has_to_be_true():
    sim = simulation()
    with pytest.raises(UserError, match="is 12 batches, but it yields 6"):
        watch = track_oscillations(sim, method="dampening")
        train(sim, Claims(DATA), 1, schedule="constant", oscillations=watch)
    train(sim, Claims(DATA), 1, schedule="constant", oscillations=track_oscillations(sim))  # follows no schedule


def sharing() -> nn.Module:
    sim = simulation(model=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    sim.get_submodule("3").parametrizations.weight.original = latent(sim, "0")
    sim.get_submodule("3").parametrizations.weight[0].scale.data.mul_(0.7)  # so that integers are others
    return sim


def test_a_weight_that_layers_share_is_followed_and_dampened_for_each():
    sim = sharing()
    watch = track_oscillations(sim, method="dampening", dampening=0.3)
    first, second = watch.layers
    assert not torch.equal(first.of(watch.state["codes"]), second.of(watch.state["codes"]))
    watch.before_step(1.0)
    expected = sum(dampening_gradient(layer.quantizer, layer.weight, 0.3) for layer in watch.layers)
    torch.testing.assert_close(latent(sim, "0").grad, expected)
    with torch.no_grad():
        latent(sim, "0").neg_()
    watch.after_step(1.0)
    for layer in watch.layers:
        assert torch.equal(layer.of(watch.state["codes"]).int(), layer.quantizer.codes(layer.weight).int())


def test_a_weight_that_layers_share_is_not_frozen():
    with pytest.raises(UserError, match="0, 3 share a weight, which cannot be held .* expected method='dampening'"):
        track_oscillations(sharing(), method="freezing")
