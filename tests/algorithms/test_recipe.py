"""What training takes for settings, and the learning rate of each step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bnre_exp import UserError, bypassed, quantize, train
from bnre_exp.algorithms.recipe import Recipe, build_optimizer, build_scheduler
from tests.algorithms.test_train_evaluate import labelled
from tests.networks import flat_cnn

PLAIN = {
    "epochs": 1, "lr": 0.1, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine",
    "label_smoothing": 0.0, "precision": "float32",
}  # fmt: skip


def rates(schedule: str, optimizer: str, steps: int) -> list[float]:
    """The learning rate of each step, relative to its peak."""
    recipe = Recipe(**{**PLAIN, "schedule": schedule, "optimizer": optimizer})
    optimize = build_optimizer(nn.Linear(2, 2), recipe)
    scheduler = build_scheduler(optimize, recipe, steps)
    found = []
    for _ in range(steps):
        found.append(optimize.param_groups[0]["lr"] / recipe.lr)
        optimize.step()
        scheduler.step()
    return found


def expected(schedule: str, steps: int) -> list[float]:
    def fall(part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2

    if schedule == "constant" or steps == 1:
        return [1.0] * steps
    if schedule == "cosine":
        return [fall(step / steps) for step in range(steps)]
    top = (0.3 if steps == 4 else 0.25) * steps - 1  # of 4 steps, the warm-up of 1 would have no length
    low, end, rest = 1 / 25, 1 / 25e4, steps - 1 - top
    return [
        low + (1 - low) * (1 - fall(step / top)) if step <= top else end + (1 - end) * fall((step - top) / rest)
        for step in range(steps)
    ]


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_the_rate_of_every_step_of_a_short_training(schedule, optimizer, steps):
    found = rates(schedule, optimizer, steps)
    assert found == pytest.approx(expected(schedule, steps), abs=1e-9) and max(found) > 0.74


def test_any_number_of_steps_has_a_schedule():
    for schedule in ("one_cycle", "cosine"):
        for steps in (*range(11, 60), 400, 1000):
            assert max(rates(schedule, "sgd", steps)) > 0.9


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epochs", [0, -1, 1e21, 10**21, 1.5, 2.0, "2", True, None, math.nan]),
        ("lr", [-0.1, math.nan, math.inf, 10**400, "0.1", None, True, torch.tensor(0.1)]),
        ("momentum", [-0.1, 1.0, 2.0, math.nan, None]),
        ("weight_decay", [-1e-4, math.nan, math.inf, "1"]),
        ("label_smoothing", [-0.1, 1.0, 2.0, math.nan]),
        ("precision", ["float16", "fp8", None, torch.bfloat16]),
        ("optimizer", ["lion", None]),
        ("schedule", ["linear", None]),
        ("steps_per_epoch", [0, -1, 1.5, "3", True]),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, values):
    model = flat_cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for value in values:
        with pytest.raises(UserError, match=f"^{name}=.*: expected "):
            train(model, labelled(), **{"epochs": 1, name: value})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_numbers_of_numpy_are_numbers():
    recipe = Recipe(**{**PLAIN, "epochs": np.int64(3), "lr": np.float32(0.5), "momentum": 0})
    assert (type(recipe.epochs), type(recipe.lr), recipe.lr, recipe.momentum) == (int, float, 0.5, 0.0)


def test_a_lazy_network_is_told_to_be_run_first():
    with pytest.raises(UserError, match="0.weight has no shape yet"):
        train(nn.Sequential(nn.LazyLinear(4)), [(torch.randn(4, 3), torch.arange(4))], 1)


def test_scales_of_quantizers_that_are_bypassed_do_not_stop_training():
    data = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    sim = quantize(flat_cnn(), data[0][0])
    with bypassed(sim):
        assert len(train(sim, data, 2, lr=1e-3)) == 2


class Layouts(nn.Module):
    """Parameters as networks hold them: channels-last, a transposed one, and one that is used late; gaps: a column of
    a larger tensor as well."""

    def __init__(self, gaps: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(5, 4).t())
        self.late = nn.Linear(5, 2)
        self.column = nn.Parameter(torch.randn(2, 3)[:, 1] if gaps else torch.randn(2))

    def forward(self, x, step):
        y = self.conv(x).mean(dim=(2, 3)) @ self.turned
        return (self.late(y) + self.column).square().sum() if step else y.square().sum()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("is_foreign", [False, True])
def test_optimizers_are_fused_where_that_is_right_and_compute_the_same(optimizer, gaps, is_foreign):
    recipe = Recipe(**{**PLAIN, "optimizer": optimizer, "weight_decay": 0.1, "lr": 0.01})
    ours, plain = Layouts(gaps), Layouts(gaps)
    found = build_optimizer(ours, recipe)
    assert all(bool(group["fused"]) != gaps for group in found.param_groups)
    groups = [{**g, "params": list(p)} for g, p in zip(found.param_groups, split(plain))]
    rest = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    expected = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](
        [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=0.01, foreach=False, **rest
    )
    for step in range(4):
        if step == 3:  # in the middle of a training, as one that is resumed may be
            ours.conv.to(memory_format=torch.contiguous_format), plain.conv.to(memory_format=torch.contiguous_format)
        x = torch.randn(6, 3, 5, 5)
        for model, stepping in ((ours, found), (plain, expected)):
            stepping.zero_grad()
            model(x, step).backward()
            if is_foreign:  # as a hook of a user's may leave it
                model.turned.grad = model.turned.grad.contiguous()
            stepping.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with weight decay, and those without."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def test_sparse_gradients_are_trained_as_before():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    optimizer = build_optimizer(model, Recipe(**{**PLAIN, "momentum": 0.0}))
    model(torch.tensor([[0, 1], [1, 3]])).square().sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    moved = (model[0].weight.detach() != before).any(dim=1)
    assert moved.tolist() == [True, True, False, True, False]
