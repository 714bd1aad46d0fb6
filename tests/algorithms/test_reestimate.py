"""Re-estimation against closed forms, against AIMET, and in every case where it must refuse or undo."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp import QuantScheme, UserError, bypassed, calibrate, quantize, reestimate_bn_stats
from tests.networks import BN, CONV, Net, flat_cnn, randomize, unequal_batches

BATCHES = unequal_batches((3, 8, 8))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def _first_bn_inputs(model: nn.Sequential, batches) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model[0](x).double().transpose(0, 1).flatten(1) for x in batches]


@pytest.mark.parametrize("num_batches", [1, 3, 4, 6])
def test_batch_average_is_the_plain_mean_of_means_and_unbiased_variances(num_batches):
    model = randomize(flat_cnn())
    reestimate_bn_stats(model, BATCHES, num_batches)
    used = list(itertools.islice(itertools.cycle(_first_bn_inputs(model, BATCHES)), num_batches))
    torch.testing.assert_close(model[1].running_mean.double(), torch.stack([x.mean(1) for x in used]).mean(0))
    torch.testing.assert_close(model[1].running_var.double(), torch.stack([x.var(1) for x in used]).mean(0))


def test_pooled_is_the_variance_of_all_samples_however_they_are_split():
    model = randomize(flat_cnn())
    reestimate_bn_stats(model, BATCHES, 4, method="pooled")
    every = torch.cat(_first_bn_inputs(model, BATCHES), dim=1)
    torch.testing.assert_close(model[1].running_mean.double(), every.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), every.var(1), rtol=1e-5, atol=1e-6)
    first = model[1].running_var.clone()
    reestimate_bn_stats(model, torch.cat(BATCHES).split(9), 3, method="pooled")
    torch.testing.assert_close(model[1].running_var, first, rtol=1e-5, atol=1e-6)


def test_pooled_keeps_its_precision_far_from_zero():
    model = nn.Sequential(nn.BatchNorm2d(2)).double()
    batches = [torch.randn(4, 2, 5, 5, dtype=torch.float64) * 1e-3 + 1e6 for _ in range(5)]
    reestimate_bn_stats(model, batches, 5, method="pooled")
    expected = torch.cat(batches).transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(model[0].running_var, expected, rtol=1e-6, atol=0)


def test_ema_equals_training_mode_with_that_momentum():
    model, trained = randomize(flat_cnn()), randomize(flat_cnn())
    reestimate_bn_stats(model, BATCHES, 4, method="ema", momentum=0.3)
    for module in trained.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.3
    with torch.no_grad():
        for x in BATCHES:
            trained.train()(x)
    for name, value in trained.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("method", ["batch_average", "pooled"])
def test_every_call_of_a_shared_bn_counts(dim, method):
    conv, bn = CONV[dim](3, 3, 1), BN[dim](3)
    model = randomize(Net(lambda m, x: m.bn(m.conv(x)) + m.bn(x), conv=conv, bn=bn))
    batches = unequal_batches((3, *(6,) * dim), sizes=(4, 7))
    reestimate_bn_stats(model, batches, 2, method=method)
    with torch.no_grad():
        calls = [y.double().transpose(0, 1).flatten(1) for x in batches for y in (conv(x), x)]
    if method == "pooled":
        mean, var = torch.cat(calls, 1).mean(1), torch.cat(calls, 1).var(1)
    else:
        mean, var = torch.stack([c.mean(1) for c in calls]).mean(0), torch.stack([c.var(1) for c in calls]).mean(0)
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-5, atol=1e-6)


def test_only_running_statistics_change_and_undo_is_exact():
    sim = quantize(randomize(flat_cnn()), BATCHES[0], QuantScheme(weight_bits=3, act_bits=4))
    calibrate(sim, BATCHES, 4)
    sim.train()
    sim.get_submodule("4").eval()
    sim.get_submodule("1").momentum = None
    modes = {name: module.training for name, module in sim.named_modules()}
    hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in sim.named_modules()}
    before = _state(sim)
    handle = reestimate_bn_stats(sim, BATCHES, 4)
    assert _changed(before, sim) == {f"{i}.running_{what}" for i in (1, 4, 7) for what in ("mean", "var")}
    assert {name: module.training for name, module in sim.named_modules()} == modes
    assert {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in sim.named_modules()} == hooks
    assert sim.get_submodule("1").momentum is None and sim.get_submodule("4").momentum == 0.1
    handle.remove()
    assert _changed(before, sim) == set()
    handle.remove()
    with reestimate_bn_stats(sim, BATCHES, 4):
        assert _changed(before, sim)
    assert _changed(before, sim) == set()


@pytest.mark.parametrize("method", ["batch_average", "pooled", "ema"])
def test_undo_is_exact_in_float64_too(method):
    model = randomize(flat_cnn()).double()
    before = _state(model)
    reestimate_bn_stats(model, [x.double() for x in BATCHES], 4, method=method).remove()
    assert _changed(before, model) == set()


def test_dropout_and_other_norms_stay_in_evaluation_mode():
    layers = {"conv": nn.Conv2d(3, 4, 1), "drop": nn.Dropout(0.5), "bn": nn.BatchNorm2d(4)}
    model = randomize(Net(lambda m, x: m.bn(m.drop(m.conv(x))), **layers)).train()
    reestimate_bn_stats(model, BATCHES[:1], 1)
    expected = model.conv(BATCHES[0]).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(model.bn.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_an_unreached_bn_keeps_its_statistics_and_is_named():
    model = randomize(Net(lambda m, x: m.bn(x), bn=nn.BatchNorm2d(3), head=nn.BatchNorm2d(3)))
    before = model.head.running_mean.clone()
    handle = reestimate_bn_stats(model, BATCHES, 2)
    assert handle.unreached == ("head",)
    assert torch.equal(model.head.running_mean, before)


def test_bns_without_affine_or_without_statistics():
    bare, none = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)
    model = Net(lambda m, x: m.none(m.bare(x)), bare=bare, none=none)
    handle = reestimate_bn_stats(model, BATCHES, 2)
    assert handle.without_statistics == ("none",)
    expected = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in BATCHES[:2]]).mean(0)
    torch.testing.assert_close(bare.running_mean, expected)
    with pytest.raises(UserError, match="no batch norm with running statistics"):
        reestimate_bn_stats(nn.Sequential(nn.Linear(2, 2)), BATCHES, 1)


def test_sync_bn_and_subclasses_are_re_estimated():
    class WithReLU(nn.BatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    model = nn.Sequential(nn.SyncBatchNorm(3), WithReLU(3))
    reestimate_bn_stats(model, BATCHES, 4)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    reestimate_bn_stats(plain, BATCHES, 4)
    for one, other in zip(model, plain):
        torch.testing.assert_close(one.running_var, other.running_var)


def test_old_statistics_that_are_not_finite_do_not_survive():
    model = randomize(flat_cnn())
    model[1].running_mean.fill_(float("nan"))
    model[4].running_var.fill_(float("inf"))
    reestimate_bn_stats(model, BATCHES, 3)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_statistics_that_are_not_finite_are_refused_and_nothing_is_committed():
    model = randomize(flat_cnn())
    before = _state(model)
    with pytest.raises(UserError, match="not finite for 1, 4, 7.*in batch 2 "):
        reestimate_bn_stats(model, [BATCHES[0], BATCHES[1] * float("nan")], 2)
    assert _changed(before, model) == set()


@pytest.mark.parametrize("method", ["batch_average", "pooled", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_value_stops_at_its_batch(method, value):
    model, used = randomize(flat_cnn()), []
    before = _state(model)

    def batches():
        for number, batch in enumerate(BATCHES, start=1):
            used.append(number)
            batch = batch.clone()
            batch[0, 0, 0, 0] = value if number == 2 else 0.0
            yield batch

    with pytest.raises(UserError, match="not finite for 1, 4, 7.*in batch 2 "):
        reestimate_bn_stats(model, batches(), 4, method=method)
    assert used == [1, 2] and _changed(before, model) == set()


def test_an_average_that_starts_from_nan_is_refused_before_the_first_batch():
    model = randomize(flat_cnn())
    model[4].running_var[0] = float("nan")
    with pytest.raises(UserError, match="method=ema starts from the present statistics, and those of 4 are not finite"):
        reestimate_bn_stats(model, BATCHES, 2, method="ema")


@pytest.mark.parametrize("number", [None, "3", 1.5, True])
def test_num_batches_is_a_whole_number(number):
    with pytest.raises(UserError, match="num_batches=.*expected at least 1"):
        reestimate_bn_stats(randomize(flat_cnn()), BATCHES, number)


def test_an_exception_on_the_way_restores_everything():
    model = randomize(flat_cnn()).train()
    before = _state(model)

    def fail_at_the_third(model, batch):
        fail_at_the_third.calls += 1
        if fail_at_the_third.calls == 3:
            raise KeyboardInterrupt
        return model(batch)

    fail_at_the_third.calls = 0
    with pytest.raises(KeyboardInterrupt):
        reestimate_bn_stats(model, BATCHES, 4, fail_at_the_third)
    assert _changed(before, model) == set()
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.1 and not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_batches_of_every_kind_and_loaders_of_every_length():
    expected = randomize(flat_cnn())
    reestimate_bn_stats(expected, BATCHES, 4)
    for loader, forward_fn in [
        ([(x, torch.zeros(len(x))) for x in BATCHES], None),
        ([[x] for x in BATCHES], None),
        ([{"image": x} for x in BATCHES], lambda model, batch: model(batch["image"])),
        ((x for x in BATCHES), None),
    ]:
        model = randomize(flat_cnn())
        handle = reestimate_bn_stats(model, loader, 4, forward_fn)
        assert (handle.num_batches, handle.loader_passes) == (4, 1)
        torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert reestimate_bn_stats(randomize(flat_cnn()), BATCHES, 10).loader_passes == 3


@pytest.mark.parametrize(
    ("loader", "num_batches", "message"),
    [
        ([], 3, "yields no batches"),
        (BATCHES, 0, "num_batches=0"),
        (BATCHES, -1, "num_batches=-1"),
        ([{"image": BATCHES[0]}], 1, "forward_fn"),
        (iter(BATCHES), 5, "yields no batches after the first 4"),
    ],
)
def test_bad_loaders_are_refused(loader, num_batches, message):
    model = randomize(flat_cnn())
    before = _state(model)
    with pytest.raises(UserError, match=message):
        reestimate_bn_stats(model, loader, num_batches)
    assert _changed(before, model) == set()


def test_one_value_per_channel_is_refused_and_the_bn_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="batch norm 1 gets a batch with one value per channel"):
        reestimate_bn_stats(model, [torch.randn(5, 3), torch.randn(1, 3)], 2)
    with pytest.raises(UserError, match="method='mean'"):
        reestimate_bn_stats(model, [torch.randn(5, 3)], 1, method="mean")


def test_the_weight_cache_leaves_no_trace_for_later_training():
    sim = quantize(randomize(flat_cnn()), BATCHES[0], QuantScheme(weight_bits=3, act_bits=None))
    for _ in range(2):
        reestimate_bn_stats(sim, BATCHES, 2)
        sim.train()
        sim(BATCHES[0]).square().mean().backward()
        gradients = [p.grad for p in sim.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
        before = sim.get_submodule("0").weight.detach().clone()
        with torch.no_grad():
            for parameter in sim.parameters():
                parameter -= 0.3 * parameter.grad
        assert not torch.equal(sim.get_submodule("0").weight.detach(), before)
        sim.zero_grad()


def test_bypassed_activation_quantizers_come_back():
    sim = quantize(randomize(flat_cnn()), BATCHES[0], QuantScheme(weight_bits=3, act_bits=2))
    calibrate(sim, BATCHES, 4)
    sim.eval()
    with torch.no_grad():
        before = sim(BATCHES[0])
        with bypassed(sim):
            assert not torch.equal(sim(BATCHES[0]), before)
        assert torch.equal(sim(BATCHES[0]), before)


def test_statistics_that_are_parameters_are_re_estimated_and_stay_parameters():
    model, batches = randomize(flat_cnn()).eval(), unequal_batches((3, 8, 8))
    other = flat_cnn()
    other.load_state_dict(model.state_dict())
    bn = next(m for m in model.modules() if isinstance(m, _BatchNorm))
    for name in ("running_mean", "running_var"):
        value = bn._buffers.pop(name)
        setattr(bn, name, nn.Parameter(value, requires_grad=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = reestimate_bn_stats(model, batches, 4)
    reestimate_bn_stats(other.eval(), batches, 4)
    assert isinstance(bn.running_mean, nn.Parameter) and not {"running_mean", "running_var"} & bn._buffers.keys()
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0, check_device=False)
    handle.remove()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
