"""Frequencies of oscillating weights, dampening and freezing, against the formulas of the paper."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, UserError, calibrate, quantize, track_oscillations, train, weight_quantizers
from bnre_exp.algorithms.oscillation import annealed, dampening_gradient, follow
from bnre_exp.quantsim.quantizers.fake_quantize import positive
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn, randomize

DATA = labelled((16,) * 6)


def simulation(bits: int = 3, seed: int = 0, model: nn.Module | None = None, **scheme):
    torch.manual_seed(seed)
    x = DATA[0][0] if model is None else torch.randn(4, 4, 6, 6)
    sim = quantize(flat_cnn() if model is None else model, x, QuantScheme(weight_bits=bits, act_bits=8, **scheme))
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


@pytest.mark.parametrize("bits", [2, 7, 8, 9, 16])
def test_a_change_across_the_whole_range_has_its_direction(bits):
    sim = simulation(bits)
    watch, weight = track_oscillations(sim), latent(sim, "0")
    with torch.no_grad():
        for value in (-1e9, 1e9, -1e9):
            weight.fill_(value)
            watch.after_step(1.0)
    layer = watch.layers[0]
    ends = layer.of(watch.state["codes"]), layer.of(watch.state["direction"]), layer.of(watch.state["frequency"])
    largest = 2 ** (bits - 1) - 1
    assert (ends[0] == -largest).all() and (ends[1] == -1).all() and (ends[2] > 0.0099).all()
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


@pytest.mark.parametrize("scheme", [{}, {"per_channel": False}], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("build", [None, grouped], ids=["flat", "transposed in groups"])
def test_the_gradient_of_dampening_is_that_of_its_formula_and_reaches_latent_weights_alone(build, scheme):
    sim = simulation(model=build and build(), **scheme)
    watch = track_oscillations(sim, method="dampening", dampening=0.3)
    with torch.no_grad():
        for layer in watch.layers:
            layer.weight.mul_(3)  # so that some lie outside of the range
            layer.quantizer.scale[0].neg_()  # what training may do; its magnitude counts
    for layer in watch.layers:
        w, s = layer.weight.detach().clone().requires_grad_(), layer.scale().detach()
        end = s * layer.quantizer.quant_max
        quantized = (w / s).round().clamp(-layer.quantizer.quant_max, layer.quantizer.quant_max) * s
        loss = (quantized.detach() - torch.minimum(torch.maximum(w, -end), end)).square().sum() * 0.3
        (expected,) = torch.autograd.grad(loss, w)
        assert (w.abs() > end).any() and expected.any()
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
    assert float(layer.weight[where]) == pytest.approx(2 * scale)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_weights_keep_their_integers_through_training_weight_decay_and_moving_scales(optimizer):
    sim, seen = simulation(), []
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


@pytest.mark.parametrize("scheme", [{}, {"per_channel": False}], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("build", [None, grouped], ids=["flat", "transposed in groups"])
def test_a_scale_has_the_gradient_of_integer_times_scale_for_frozen_weights(build, scheme):
    sim = simulation(model=build and build(), **scheme)
    watch = track_oscillations(sim, method="freezing")
    torch.manual_seed(1)
    watch.state["frozen"].bernoulli_(0.5)
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


def test_layers_that_share_a_weight_are_refused():
    sim = simulation(model=nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    sim.get_submodule("2").parametrizations.weight.original = latent(sim, "0")
    with pytest.raises(UserError, match="0, 2 share a weight"):
        track_oscillations(sim)
