"""The loop over batches that re-estimation is made of: what may happen between two of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bnre_exp import UserError, reestimate_bn_stats
from bnre_exp.algorithms.bn_statistics import check_count, commit, observe_batches
from bnre_exp.algorithms.feeding import Passes
from bnre_exp.algorithms.recorder import Recorder
from bnre_exp.progress import no_progress
from tests.networks import flat_cnn, randomize, unequal_batches

BATCHES = [x.double() for x in unequal_batches((3, 8, 8))]


def batch_norms(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def observed(model: nn.Module, method: str, num_batches: int):
    """Yields after each batch what the estimators have by then."""
    bns = batch_norms(model)
    recorder = Recorder(bns, method, 0.1)

    def observe(batch):
        with recorder.batch():
            model(batch)

    count = Passes()
    for _ in observe_batches(BATCHES, num_batches, observe, count, no_progress):
        yield count, {bns[bn]: estimator.result(torch.float64) for bn, estimator in recorder.estimators.items()}


@pytest.mark.parametrize("method", ["batch_average", "pooled", "ema"])
def test_after_every_batch_the_estimates_are_those_of_so_many_batches(method):
    model = randomize(flat_cnn()).double().eval()
    kept = [results for _, results in observed(model, method, 6)]
    for num_batches, results in enumerate(kept, 1):
        with reestimate_bn_stats(model, BATCHES, num_batches, method=method):
            for bn, name in batch_norms(model).items():
                assert torch.equal(results[name][0], bn.running_mean) and torch.equal(results[name][1], bn.running_var)


def test_between_two_batches_the_network_is_as_it_was():
    model = randomize(flat_cnn()).double().eval()
    before = state(model)
    steps = observed(model, "pooled", 9)
    for count, _ in itertools.islice(steps, 5):
        assert (count.batches, count.passes) in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 2))
        assert not model[1].training and model[1].momentum == 0.1 and not model[1]._forward_hooks
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    steps.close()  # stopped early
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


def test_all_are_written_or_none():
    written, ones, nan = [], torch.ones(2), torch.full((2,), torch.nan)

    def write(key, statistics):
        if key == "fails":
            raise KeyboardInterrupt
        written.append(key)
        return lambda: written.remove(key)

    names = {key: f"bn of {key}" for key in ("first", "second", "fails")}
    with pytest.raises(UserError, match="not finite for bn of second"):
        commit(names, {"first": (ones, ones), "second": (ones, nan)}, write)
    assert not written
    with pytest.raises(KeyboardInterrupt):
        commit(names, {"first": (ones, ones), "second": (ones, ones), "fails": (ones, ones)}, write)
    assert not written
    undo = commit(names, {"first": (ones, ones), "second": (ones, ones)}, write)
    assert written == ["first", "second"]
    undo.close()
    assert not written


def test_one_value_per_channel_has_no_variance():
    check_count("bn", 2)
    with pytest.raises(UserError, match="batch norm bn gets a batch with one value"):
        check_count("bn", 1)
