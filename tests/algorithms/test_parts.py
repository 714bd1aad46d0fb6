"""Algorithms on networks of which only parts are simulated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp import (
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    integer_simulation,
    list_layers,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    train,
)
from bnre_exp.algorithms.compare import compare_outputs
from bnre_exp.quantsim.whole import parts_of
from tests.detectors import LABELS, PARTS, block, detector, equal, folded_detector, images, tensors
from tests.networks import Net, randomize


def simulated(**scheme) -> Any:
    return quantize(detector(), images()[0], QuantScheme(**scheme), submodules=PARTS)


@pytest.fixture(scope="module")
def calibrated_once():
    sim = simulated(weight_bits=4)
    calibrate(sim, images(), num_batches=4)
    return sim


@pytest.fixture
def sim(calibrated_once):
    return copy.deepcopy(calibrated_once)


def test_calibration_changes_ranges_alone_and_leaves_modes():
    sim = simulated().train()
    sim.normalize.eval()
    before, modes = copy.deepcopy(sim.state_dict()), {name: m.training for name, m in sim.named_modules()}
    calibrate(sim, images(), num_batches=4)
    changed = {name for name, x in sim.state_dict().items() if not equal([torch.as_tensor(x)], [before[name]])}
    assert changed and all("act_quantizers" in name for name in changed)
    assert all(quantizer.has_range for quantizer in activation_quantizers(sim).values())
    assert {name: m.training for name, m in sim.named_modules()} == modes and sim.head.losses.__self__.training


@pytest.mark.parametrize("act_range", ["minmax", "mse"])
def test_a_head_over_several_maps_is_calibrated_and_reestimated_on_all_of_them(act_range):
    """The same as a head alone that gets each map as a batch."""
    levels = [nn.Identity(), nn.AvgPool2d(2), nn.AvgPool2d(4)]
    head = randomize(block(3, 8)).eval()
    model = Net(lambda m, x: [m.head(level(x) * 3) for level in levels], head=head)
    scheme = QuantScheme(4, 8, act_range=act_range)
    sim = quantize(model, images()[0], scheme, submodules=["head"])
    alone = quantize(head, images()[0], scheme)
    maps = [level(x) * 3 for x in images() for level in levels]
    for network, batches in ((sim, images()), (alone, maps)):
        calibrate(network, batches, num_batches=len(batches))
        reestimate_bn_stats(network, batches, num_batches=len(batches))
    assert equal(sim.head.network.state_dict(), alone.state_dict())


def expected_statistics(sim: nn.Module) -> dict[str, list[Tensor]]:
    """Plain means over all calls, each normalized by its own batch."""
    seen, handles = {}, []
    for name, module in sim.named_modules():
        if isinstance(module, _BatchNorm):
            module.train()

            def see(_: nn.Module, args: Any, name: str = name) -> None:
                var, mean = torch.var_mean(args[0].double(), (0, 2, 3))
                seen.setdefault(name, []).append((mean, var))

            handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for x in images():
            sim(x)
    return {name: [torch.stack(values).mean(0).float() for values in zip(*calls)] for name, calls in seen.items()}


def test_reestimation_takes_in_all_calls_changes_statistics_alone_and_is_undone(sim):
    before = copy.deepcopy(sim.state_dict())
    expected = expected_statistics(copy.deepcopy(sim))
    handle = reestimate_bn_stats(sim, images(), num_batches=4)
    assert handle.unreached == () and len(expected) == 4
    changed = {name for name, x in sim.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"{name}.running_{what}" for name in expected for what in ("mean", "var")}
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(sim.get_submodule(name).running_mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sim.get_submodule(name).running_var, var, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert equal(sim.state_dict(), before)


def test_a_batch_norm_that_values_choose_is_reestimated_on_the_calls_that_there_are():
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model.head(x) if float(x.mean()) > 1 else x

    model = Net(forward, head=randomize(block(3, 8)).eval())
    sim = quantize(model, images()[3], submodules=["head"])
    alone = quantize(model.head, images()[3])
    some = [x for x in images() if float(x.mean()) > 1]
    assert 0 < len(some) < 4
    with bypassed(sim), bypassed(alone):
        reestimate_bn_stats(sim, images(), num_batches=4)
        reestimate_bn_stats(alone, some, num_batches=len(some))
    assert equal(sim.head.network.state_dict(), alone.state_dict())


def test_training_lowers_the_loss_and_reaches_all_that_is_trained(sim):
    before = copy.deepcopy(dict(sim.named_parameters()))
    data = [(images()[0], LABELS)]
    losses = []

    def loss_fn(output: Any, _: Any) -> Tensor:
        losses.append(output["score"])
        return sum(output.values())

    def feed(network: nn.Module, batch: Any) -> Any:
        return network(*batch)

    train(sim, data, 12, lr=0.02, forward_fn=feed, target_fn=lambda batch: batch[1], loss_fn=loss_fn)
    assert float(losses[-1].detach()) < 0.8 * float(losses[0].detach())
    unchanged = [name for name, p in sim.named_parameters() if torch.equal(p, before[name])]
    assert all("act_quantizers" in name for name in unchanged) and not sim.training


@pytest.mark.parametrize("mode", ["scale", "weight"])
def test_folding_keeps_the_function_and_names_everything(sim, mode):
    sim.train()
    before = copy.deepcopy(sim.state_dict())
    folded, report = fold_batch_norms(sim, mode)
    layers = ("backbone.stem.0", "backbone.down.0", "head.tower.0")
    assert report.folded == tuple((name, f"{name[:-1]}1") for name in layers) and report.kept == ()
    assert [name for name, _ in report.lossy] == ([] if mode == "scale" else list(layers))
    assert {row.bn for row in list_layers(sim) if row.bn} == {
        f"{bn} folded into {layer}" for layer, bn in report.folded
    }
    assert equal(sim.state_dict(), before) and sim.training and not any(m.training for m in folded.modules())
    assert not any(isinstance(m, _BatchNorm) for part in parts_of(folded).values() for m in part.modules())
    assert isinstance(folded.normalize, nn.BatchNorm2d) and type(folded) is type(sim)
    found = compare_outputs(sim, folded, images())
    assert found.relative < (1e-5 if mode == "scale" else 0.1) and found.magnitude > 1
    sim.eval()
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        pairs = list(zip(tensors(sim(images()[0])), tensors(folded(images()[0])), strict=True))
        if mode == "scale":
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    with pytest.raises(UserError, match="folded already"):
        fold_batch_norms(folded)
    with pytest.raises(UserError, match="this network is folded"):
        list_layers(folded)


def test_biases_of_all_parts_are_rounded_and_named(sim):
    folded, _ = fold_batch_norms(sim)
    floats = {name: m.bias.detach().clone() for name, m in folded.named_modules() if isinstance(m, nn.Conv2d)}
    report = quantize_biases(folded)
    several = "called with inputs of different scales"
    assert report.rounded == ("backbone.stem.0", "backbone.down.0")
    assert report.kept == tuple((f"head.{name}", several) for name in ("tower.0", "box", "score"))
    for name in report.rounded:
        part, _, inner = name.partition(".")
        layer = parts_of(folded)[part].get_submodule(inner)
        step = layer.parametrizations.bias[0].scale
        assert torch.equal((layer.bias / step).round() * step, layer.bias)
        difference = (layer.bias - floats[f"{part}.network.{inner}"]).abs()
        assert bool((difference <= step).all()) and bool(difference.any())


def test_integers_give_what_the_folded_network_does_but_for_ties():
    folded = folded_detector(detector())
    integers = integer_simulation(folded)
    kinds = [type(m).__name__ for m in integers.modules()]
    assert kinds.count("IntegerLayer") == 2 and equal(integers.normalize.state_dict(), folded.normalize.state_dict())
    with torch.no_grad():
        x = folded.normalize(images()[1])
        for a, b in zip(folded.backbone(x).values(), integers.backbone(x).values(), strict=True):
            step = float(b[b > 0].min())
            assert float((a - b).abs().max()) < 1.01 * step and float(((a - b).abs() > step / 2).double().mean()) < 0.02
        assert len(tensors(integers(images()[1]))) == 10


def test_comparison_tells_the_part_that_differs_most(sim):
    assert compare_outputs(sim, sim, images()).largest == 0
    other = copy.deepcopy(sim)
    with torch.no_grad():
        other.head.network.box.bias.add_(1)
    found = compare_outputs(sim, other, images())
    assert found.largest == pytest.approx(8) and found.relative == found.largest / found.magnitude
    assert not any(m._forward_hooks for m in sim.modules())
    with pytest.raises(UserError, match="no batches"):
        compare_outputs(sim, other, [])
    with pytest.raises(UserError, match="backbone, head is not called by the network for any of these batches"):
        compare_outputs(sim, other, images(), forward_fn=lambda network, batch: batch)
    some = quantize(detector(), images()[0], submodules=["backbone"])
    with pytest.raises(UserError, match="their parts are"):
        compare_outputs(sim, some, images())


def test_training_goes_on_from_a_state_as_from_the_simulation(sim):
    other = quantize(detector(5), images()[0], QuantScheme(weight_bits=4), submodules=PARTS)
    other.load_state_dict(sim.state_dict())
    before = copy.deepcopy(sim.state_dict())
    for network in (sim, other):
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(network(images()[0], LABELS).values()).backward()
            optimizer.step()
    assert equal(sim.state_dict(), other.state_dict()) and not equal(sim.state_dict(), before)


@pytest.mark.parametrize("what", ["calibrate", "fold", "biases", "integers"])
def test_what_is_no_simulation_is_refused_as_ever(what, sim):
    wrong = {
        "calibrate": lambda: calibrate(nn.DataParallel(sim), images()),
        "fold": lambda: fold_batch_norms(detector()),
        "biases": lambda: quantize_biases(detector()),
        "integers": lambda: integer_simulation(sim),
    }
    with pytest.raises(UserError, match="xpected a network that"):
        wrong[what]()


def test_values_that_are_not_finite_are_told_with_the_part(sim):
    with torch.no_grad():
        sim.head.network.tower.get_submodule("1").running_var[2] = torch.nan
    with pytest.raises(UserError, match=r"head: .*tower\.1\.running_var is not finite"):
        fold_batch_norms(sim)


def test_a_wrapper_runs_a_simulation(sim):
    expected = sim(images()[1])
    assert equal(nn.DataParallel(sim)(images()[1]), expected)
