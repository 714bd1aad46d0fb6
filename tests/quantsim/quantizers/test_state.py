"""The scheme is part of a simulation's state: another scheme's is refused."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from bnre_exp import LayerRule, QuantScheme, UserError, calibrate, fold_batch_norms, quantize
from bnre_exp.algorithms.snapshot import Training, capture, restore
from bnre_exp.quantsim.quantizers.state import scheme_keys
from tests.networks import flat_cnn, randomize

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
W4 = QuantScheme(weight_bits=4, act_bits=8)


def simulation(scheme: QuantScheme = W4, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    sim = quantize(model or randomize(flat_cnn(), seed).eval(), X, scheme)
    calibrate(sim, [X], 1)
    return sim


def without_schemes(sim: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in sim.state_dict().items() if not name.endswith("_extra_state")}


def one_channel() -> nn.Module:
    return randomize(nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1))).eval()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(W4, weight_bits=8), "0 was saved with bits=4, per_channel=True, learned=True, .*and has bits=8, "),
        (replace(W4, overrides=(LayerRule("3", weight_bits=8),)), "3 was saved with bits=4, .*and has bits=8, "),
        (replace(W4, act_bits=4), "_quantizers.input_1 was saved with bits=8, unsigned=False.*and has bits=4, "),
        (replace(W4, range_learning=False), "learned=True, .*and has bits=4, per_channel=True, learned=False"),
        (replace(W4, per_channel=False), "per_channel=True, learned=True, .*and has bits=4, per_channel=False"),
    ],
    ids=["weights", "one layer", "activations", "learned", "per tensor"],
)
def test_the_state_of_another_scheme_is_refused(other, message, strict):
    with pytest.raises(UserError, match=message):
        simulation(other).load_state_dict(simulation().state_dict(), strict=strict)


def test_one_scale_of_one_channel_is_not_one_of_the_tensor():
    state = simulation(model=one_channel()).state_dict()
    with pytest.raises(UserError, match="per_channel=True.*per_channel=False"):
        simulation(replace(W4, per_channel=False), model=one_channel()).load_state_dict(state)


def test_signedness_is_part_of_it():
    relu = simulation(model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    tanh = simulation(model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()))
    with pytest.raises(UserError, match="unsigned=True.*unsigned=False"):
        tanh.load_state_dict(relu.state_dict(), strict=False)


def test_codes_of_another_scheme_are_refused():
    """Codes of 8 bits in a layer of 4 would be cut when they are packed."""
    narrow, _ = fold_batch_norms(simulation())
    wide, _ = fold_batch_norms(simulation(replace(W4, weight_bits=8)))
    with pytest.raises(UserError, match="0 was saved with bits=8, per_channel=True, and has bits=4"):
        narrow.load_state_dict(wide.state_dict())
    other, _ = fold_batch_norms(simulation(seed=1))
    other.load_state_dict(narrow.state_dict())
    assert torch.equal(other(X), narrow(X))


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_before_loads(strict):
    sim, other = simulation(), simulation(seed=1)
    result = other.load_state_dict(without_schemes(sim), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys and torch.equal(other(X), sim(X))
    with pytest.raises(RuntimeError, match="Missing key.*act_quantizers"):
        state = {key: value for key, value in without_schemes(sim).items() if "act_quantizers" not in key}
        other.load_state_dict(state)


def through_torch(sim, other, path):
    file = io.BytesIO()
    torch.save(sim.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


def through_safetensors(sim, other, path):
    save_model(sim, path / "state.safetensors")
    assert load_model(other, path / "state.safetensors") == (set(), [])


def through_a_wrapper(sim, other, path):
    nn.ModuleDict({"module": other}).load_state_dict(nn.ModuleDict({"module": sim}).state_dict())


def through_assignment(sim, other, path):
    other.load_state_dict(copy.deepcopy(sim).state_dict(), assign=True)


def through_an_average(sim, other, path):
    """Of equal states, as EMA computes it: the numbers of a scheme are then no integers."""
    average = {key: value * 0.3 for key, value in sim.state_dict().items()}
    for _ in range(7):
        average = {key: value + sim.state_dict()[key] * 0.1 for key, value in average.items()}
    other.load_state_dict(average)


def through_a_snapshot(sim, other, path, leave_out=False):
    def training(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return Training(model, optimizer, scheduler, loaders={}, settings={})

    snapshot = capture(training(sim), [])
    if leave_out:
        for key in [key for key in snapshot.tensors if key.endswith("_extra_state")]:
            del snapshot.tensors[key]
    restore(training(other), snapshot)


def through_a_snapshot_of_before(sim, other, path):
    through_a_snapshot(sim, other, path, leave_out=True)


WAYS = [through_torch, through_safetensors, through_a_wrapper, through_assignment, through_an_average,
        through_a_snapshot, through_a_snapshot_of_before]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@torch.no_grad()
def test_ways_that_a_state_goes(way, tmp_path):
    sim, other = simulation(), simulation(seed=1)
    way(sim, other, tmp_path)
    torch.testing.assert_close(other(X), sim(X), rtol=1e-3 if "average" in way.__name__ else 0, atol=0)


@pytest.mark.parametrize("way", WAYS[:-1], ids=lambda way: way.__name__)
def test_no_way_leads_to_another_scheme(way, tmp_path):
    wide = simulation(replace(W4, weight_bits=8))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(UserError, match="bits=4|_extra_state was"):
        way(simulation(), wide, tmp_path)
    if way is through_a_snapshot:
        assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


def test_schemes_are_tensors_on_the_cpu_under_names_of_their_own():
    sim = simulation()
    keys = scheme_keys(sim)
    assert keys == sim.state_dict().keys() - without_schemes(sim).keys() and "act_quantizers._2._extra_state" in keys
    assert sim.state_dict()["0.parametrizations.weight.0._extra_state"].tolist() == [4, 1, 1, 0]
    with torch.device("meta"):
        assert not sim.state_dict()["act_quantizers._2._extra_state"].is_meta


def test_a_simulations_state_does_not_fit_into_a_folded_network_nor_the_other_way_round():
    sim = quantize(randomize(flat_cnn()), X)
    calibrate(sim, [X], 1)
    folded, _ = fold_batch_norms(sim)
    for network, state in ((folded, sim.state_dict()), (sim, folded.state_dict())):
        with pytest.raises(UserError, match="of another kind of network"):
            network.load_state_dict(state)
