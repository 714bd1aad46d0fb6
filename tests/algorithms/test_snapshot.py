"""A training that was interrupted and goes on ends with the same bits as one that was not."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bnre_exp import QuantScheme, UserError, calibrate, quantize, reestimate_bn_stats, track_oscillations, train
from bnre_exp.algorithms.snapshot import Snapshot, Training, capture, restore
from bnre_exp.data.loaders import Preprocessing, build_loaders
from bnre_exp.data.spec import DataSpec
from tests.networks import Net

EPOCHS = 3
SMALL = Preprocessing(16, 16, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
RECIPES = [
    {"optimizer": "sgd", "schedule": "one_cycle", "lr": 0.1, "weight_decay": 1e-3},
    {"optimizer": "sgd", "schedule": "cosine", "lr": 0.05},
    {"optimizer": "adamw", "schedule": "cosine", "lr": 0.01, "weight_decay": 1e-2},
    {"optimizer": "sgd", "schedule": "constant", "lr": 0.02, "label_smoothing": 0.1},
]
NAMES = [f"{recipe['optimizer']}-{recipe['schedule']}" for recipe in RECIPES]


class Killed(Exception):
    """Stands for whatever ends the process."""


class Serialised:
    """Keeps what a file would keep of the last snapshot: bytes and text."""

    def __init__(self) -> None:
        self.content: tuple[bytes, str] | None = None
        self.saves = 0

    def save(self, snapshot: Snapshot) -> None:
        assert json.loads(json.dumps(snapshot.values)) == snapshot.values
        self.content = safetensors.torch.save(snapshot.tensors), json.dumps(snapshot.values)
        self.saves += 1

    def load(self) -> Snapshot | None:
        if self.content is None:
            return None
        return Snapshot(safetensors.torch.load(self.content[0]), json.loads(self.content[1]))


class Noisy(Dataset[Any]):
    """Images to which every read adds noise from the global generators of Python, numpy and torch."""

    def __len__(self) -> int:
        return 51  # odd, so that of pairs of Gaussian numbers one is left over between epochs

    def __getitem__(self, index: int) -> Any:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return pixels + torch.randn(1) + np.random.normal() + random.gauss(0, 1), index % 10


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def float_network() -> nn.Module:
    layers = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(24, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def simulation(calibrated: bool) -> nn.Module:
    x = torch.randn(8, 3, 16, 16)
    sim = quantize(float_network(), x, QuantScheme(weight_bits=4, act_bits=8))
    if calibrated:
        calibrate(sim, [x], 1)
    return sim


def digits(seed: int, workers: int = 0) -> tuple[Any, Any]:
    spec = DataSpec(
        "bnre_exp.data.digits", seed=3, batch_size=32, eval_batch_size=40, val_fraction=0.3, train_limit=200,
        test_limit=20, augment=True, workers=workers,
    )  # fmt: skip
    loaders = build_loaders(spec, preprocessing=SMALL)
    loaders.train.batch_sampler.generator.manual_seed(seed)  # type: ignore[union-attr]
    loaders.train.generator.manual_seed(seed)  # type: ignore[union-attr]
    return loaders.train, loaders.validation


def build_data(kind: str, seed: int) -> tuple[Any, Any]:
    """Loaders for training and validation whose own generators, if they have any, start from ``seed``."""
    if kind.startswith("digits"):
        return digits(seed, workers=2 if kind.endswith("workers") else 0)
    if kind == "global":
        return DataLoader(Noisy(), 16, shuffle=True, drop_last=True), DataLoader(Noisy(), 25)
    own, others = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    train_loader = DataLoader(Noisy(), 16, shuffle=True, drop_last=True, num_workers=2, generator=own)
    return train_loader, DataLoader(Noisy(), 25, num_workers=1, generator=others)


@dataclass
class Run:
    """One training in a process that was seeded with ``seed``, and what can be seen of it afterwards."""

    seed: int
    network: str = "float"
    data: str = "digits"
    stop: tuple[str, int] | None = None
    oscillation: str | None = None

    def __post_init__(self) -> None:
        self.loader, self.validation = build_data(self.data, self.seed)
        seed_all(self.seed)  # after libraries were imported for the data: rich draws as it is imported
        # Whoever resumes a simulation need not calibrate it: ranges are restored.
        self.model = float_network() if self.network == "float" else simulation(calibrated=self.seed == 1)
        self.events: list[Any] = []
        self.watch = self.control = None
        if self.oscillation is not None:
            self.watch = track_oscillations(self.model, method=self.oscillation, momentum=0.1, freeze_from=0.05)
            again = lambda model: reestimate_bn_stats(model, self.validation, 2)  # noqa: E731
            self.control = {"oscillations": self.watch, "ema_decay": 0.8, "before_validation": again}

    def on_epoch(self, epoch: Any) -> None:
        self.events.append(epoch.epoch)
        if self.stop == ("on_epoch", epoch.epoch):
            raise Killed
        torch.rand(1)  # a callback may draw, too

    def progress(self, iterable: Any, description: str, total: int | None = None) -> Any:
        self.events.append(description)
        for number, item in enumerate(iterable):
            if number == 2 and self.stop == ("mid_epoch", int(description.split()[1].split("/")[0]) - 1):
                raise Killed
            yield item

    def train(self, snapshots: Any = None, epochs: int = EPOCHS, **recipe: Any) -> list[Any]:
        try:
            self.history = train(
                self.model, self.loader, epochs, validation=self.validation, on_epoch=self.on_epoch,
                progress=self.progress, snapshots=snapshots, **recipe, **(self.control or {}),
            )  # fmt: skip
        except Killed:
            assert self.stop is not None
        else:
            assert self.stop is None
            self.random = random.getstate(), np.random.get_state(), torch.get_rng_state()
            self.generators = [
                generator.get_state()
                for owner in (self.loader, self.loader.batch_sampler, self.loader.sampler, self.validation)
                if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
            ]
            return self.history
        return []


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert one[name].stride() == other[name].stride(), name


def assert_same_end(resumed: Run, whole: Run) -> None:
    assert [replace(e, seconds=0.0) for e in resumed.history] == [replace(e, seconds=0.0) for e in whole.history]
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.random[0] == whole.random[0]
    assert all(np.array_equal(a, b) for a, b in zip(resumed.random[1], whole.random[1]))
    assert torch.equal(resumed.random[2], whole.random[2])
    assert len(resumed.generators) == len(whole.generators)
    assert all(torch.equal(a, b) for a, b in zip(resumed.generators, whole.generators))
    assert not resumed.model.training
    if whole.watch is not None and resumed.watch is not None:
        assert_same_state(resumed.watch.tensors, whole.watch.tensors)
        assert whole.watch.state["frequency"].any()


def check_resuming(stop: tuple[str, int], recipe: dict[str, Any], **how: Any) -> None:
    whole = Run(1, **how)
    whole.train(**recipe)
    snapshots = Serialised()
    Run(1, stop=stop, **how).train(snapshots, **recipe)
    assert snapshots.saves == stop[1]
    resumed = Run(2, **how)
    resumed.train(snapshots, **recipe)
    assert_same_end(resumed, whole)
    # The epochs before come first, and only the others are trained.
    expected = [*range(1, stop[1] + 1)]
    for epoch in range(stop[1] + 1, EPOCHS + 1):
        expected += [f"train {epoch}/{EPOCHS}", epoch]
    assert resumed.events == expected and snapshots.saves == EPOCHS


# Each network with each data and each recipe at least once; the other half is slow.
EVERY = list(itertools.product(["float", "simulation"], ["digits", "global"], range(len(RECIPES))))
SETTINGS = [
    pytest.param(
        network, data, RECIPES[number], id=f"{network}-{data}-{NAMES[number]}",
        marks=pytest.mark.slow if ((network == "float") + (data == "digits") + number) % 2 else [],
    )
    for network, data, number in EVERY
]  # fmt: skip


@pytest.mark.parametrize(("network", "data", "recipe"), SETTINGS)
def test_a_training_killed_within_an_epoch_goes_on_with_the_same_bits(network, data, recipe):
    check_resuming(("mid_epoch", 2 if recipe["schedule"] == "one_cycle" else 1), recipe, network=network, data=data)


@pytest.mark.parametrize("stop", [("mid_epoch", 1), ("on_epoch", 2), ("on_epoch", 3)], ids=str)
@pytest.mark.parametrize("oscillation", ["freezing", "dampening"])
def test_a_training_with_control_goes_on_with_the_same_bits(oscillation, stop):
    recipe = {**RECIPES[1], "freeze_bn_epoch": 3, "bn_momentum": 0.3}
    check_resuming(stop, recipe, network="simulation", data="digits", oscillation=oscillation)


def test_a_training_with_other_control_is_refused_and_nothing_changed():
    snapshots, how = Serialised(), {"network": "simulation", "oscillation": "freezing"}
    Run(1, stop=("on_epoch", 1), **how).train(snapshots, **RECIPES[1])
    other = Run(2, **how)
    other.watch.state["average"].fill_(7.0)
    for changes, message in (
        ({"bn_momentum": 0.2}, "bn_momentum was None and is 0.2"),
        ({"freeze_bn_epoch": 1}, "freeze_bn_epoch was None and is 1"),
    ):
        with pytest.raises(UserError, match=message):
            other.train(snapshots, **RECIPES[1], **changes)
    with pytest.raises(UserError, match="ema_decay was 0.8 and is None.*oscillation was 'freezing' and is None"):
        train(simulation(True), other.loader, EPOCHS, snapshots=snapshots, **RECIPES[1])
    assert (other.watch.state["average"] == 7.0).all()


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("data", ["digits", "global"])
def test_a_training_killed_between_epochs_goes_on_with_the_same_bits(data, after):
    check_resuming(("on_epoch", after), RECIPES[0], data=data)


@pytest.mark.parametrize(
    "data", ["own generator and workers", pytest.param("digits with workers", marks=pytest.mark.slow)]
)
def test_random_numbers_of_workers_go_on_as_well(data):
    check_resuming(("mid_epoch", 1), RECIPES[1], data=data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_states_of_cuda_devices_go_on_as_well():
    model = float_network().cuda()
    training = training_of(model)
    snapshot = capture(training, [])
    expected = torch.rand(3, device="cuda")
    restore(training, snapshot)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    take_step(training)
    snapshot = capture(training, [])
    fresh = training_of(float_network().cuda())
    restore(fresh, snapshot)
    for parameter in fresh.model.parameters():
        assert fresh.optimizer.state[parameter]["momentum_buffer"].is_cuda


def test_a_finished_training_is_not_trained_again():
    snapshots, whole = Serialised(), Run(1)
    whole.train(snapshots, **RECIPES[0])
    resumed = Run(2)
    assert resumed.train(snapshots, **RECIPES[0]) == whole.history
    assert resumed.events == [1, 2, 3] and snapshots.saves == EPOCHS
    assert_same_end(resumed, whole)


def test_an_epoch_is_saved_with_its_validation_before_it_is_reported():
    snapshots, seen = Serialised(), []

    def on_epoch(epoch: Any) -> None:
        saved = snapshots.load()
        assert saved is not None
        assert saved.values["epoch"] == epoch.epoch and saved.values["history"][-1]["val_loss"] == epoch.val_loss
        seen.append(epoch)

    model, loaders = float_network(), digits(1)
    assert train(model, loaders[0], 2, validation=loaders[1], on_epoch=on_epoch, snapshots=snapshots) == seen
    assert len(seen) == 2 and seen[0].val_loss is not None


def test_what_was_saved_does_not_change_as_training_goes_on():
    class InMemory:
        saved: list[tuple[Snapshot, bytes, str]] = []

        def load(self) -> Snapshot | None:
            return self.saved[0][0] if self.saved else None

        def save(self, snapshot: Snapshot) -> None:
            self.saved.append((snapshot, safetensors.torch.save(snapshot.tensors), json.dumps(snapshot.values)))

    snapshots = InMemory()
    for seed in (1, 2):  # the second training goes on from the first snapshot
        Run(seed).train(snapshots, **RECIPES[2])
    for snapshot, content, text in snapshots.saved:
        assert safetensors.torch.save(snapshot.tensors) == content and json.dumps(snapshot.values) == text
    assert len(snapshots.saved) == 2 * EPOCHS - 1


def training_of(model: nn.Module, epochs: int = 4) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return Training(model, optimizer, scheduler, {}, {"epochs": epochs})


def take_step(training: Training) -> None:
    device = next(training.model.parameters()).device
    training.model(torch.randn(4, 3, 16, 16, device=device)).square().mean().backward()
    training.optimizer.step()
    training.scheduler.step()


def round_trip(snapshot: Snapshot) -> Snapshot:
    kept = Serialised()
    kept.save(snapshot)
    loaded = kept.load()
    assert loaded is not None
    return loaded


def test_momentum_buffers_come_back_in_the_memory_format_of_their_parameters():
    first, second = training_of(float_network()), training_of(float_network())
    take_step(first)
    restore(second, round_trip(capture(first, [])))
    for one, other in zip(first.model.parameters(), second.model.parameters()):
        buffers = [t.optimizer.state[p]["momentum_buffer"] for t, p in ((first, one), (second, other))]
        assert torch.equal(*buffers) and buffers[0].stride() == buffers[1].stride()
        if other.dim() == 4:
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (one, other, *buffers))
    assert not second.model[0].weight.is_contiguous()  # type: ignore[union-attr,operator]


def test_adamw_gets_back_every_number_of_its_groups_and_its_step_count():
    def adamw() -> Training:
        model = float_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.95))
        return Training(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 9), {}, {})

    first, second = adamw(), adamw()
    for _ in range(3):
        take_step(first)
    restore(second, round_trip(capture(first, [])))
    groups = [{k: v for k, v in t.optimizer.param_groups[0].items() if k != "params"} for t in (first, second)]
    assert groups[0] == groups[1] and first.scheduler.state_dict() == second.scheduler.state_dict()
    for one, other in zip(first.model.parameters(), second.model.parameters()):
        states = first.optimizer.state[one], second.optimizer.state[other]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert_same_state(*states)


def test_losses_that_are_no_numbers_are_kept():
    history = [{"epoch": 1, "val_loss": math.inf}, {"epoch": 2, "val_loss": math.nan, "loss": 0.1 + 0.2}]
    values = json.loads(json.dumps(capture(training_of(float_network()), history).values))
    assert values["history"][0] == history[0] and values["epoch"] == 2
    assert math.isnan(values["history"][1]["val_loss"]) and values["history"][1]["loss"] == 0.1 + 0.2


def tied() -> nn.Module:
    net = Net(
        lambda m, x: m.last(m.second(m.norm(m.first(x.mean((2, 3)).repeat(1, 4))).relu())),
        first=nn.Linear(12, 12), norm=nn.BatchNorm1d(12), second=nn.Linear(12, 12), last=nn.Linear(12, 10),
    )  # fmt: skip
    net.second.weight = net.first.weight
    return net


def test_tied_weights_stay_tied():
    def run(seed: int, snapshots: Any, on_epoch: Any = None) -> nn.Module:
        seed_all(seed)
        model = tied()
        train(model, digits(seed)[0], EPOCHS, lr=0.05, snapshots=snapshots, on_epoch=on_epoch)
        return model

    def kill(epoch: Any) -> None:
        if epoch.epoch == 2:
            raise Killed

    whole, snapshots = run(1, None), Serialised()
    with pytest.raises(Killed):
        run(1, snapshots, kill)
    resumed = run(2, snapshots)
    assert resumed.first.weight is resumed.second.weight
    assert_same_state(resumed.state_dict(), whole.state_dict())
    apart = tied()
    apart.second.weight = nn.Parameter(apart.first.weight.detach().clone())
    with pytest.raises(UserError, match="other parameters are trained in group 0: second.weight"):
        train(apart, digits(1)[0], EPOCHS, lr=0.05, snapshots=snapshots)


def widened() -> nn.Module:
    model: Any = float_network()
    model[7], model[8], model[13] = nn.Conv2d(16, 20, 1), nn.BatchNorm2d(20), nn.Linear(20, 10)
    return model


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (float_network, {"epochs": 5}, r"epochs was 3 and is 5\. Train as it was begun, or delete"),
        (float_network, {"lr": 0.2}, r"lr was 0\.1 and is 0\.2\. "),
        (float_network, {"optimizer": "adamw"}, "optimizer was 'sgd' and is 'adamw'"),
        (float_network, {"schedule": "constant"}, "schedule was 'one_cycle' and is 'constant'"),
        (widened, {}, r"7\.weight was float32 \[24, 16, 1, 1\] and is float32 \[20, 16, 1, 1\];.*; and 2 more\. "),
        (lambda: float_network().double(), {}, r"0\.weight was float32 \[.*\] and is float64"),
        (lambda: nn.Sequential(*float_network(), nn.BatchNorm1d(10)), {}, "14.bias is missing from it"),
        (lambda: nn.Sequential(*list(float_network())[:-1]), {}, "13.bias is in it, but not here"),
    ],
)
def test_a_snapshot_of_another_training_is_refused_and_nothing_changed(model, changes, message):
    snapshots = Serialised()
    Run(1, stop=("on_epoch", 1)).train(snapshots, **RECIPES[0])
    other = Run(2)
    other.model = model()
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), other.loader.batch_sampler.generator.get_state()
    with pytest.raises(UserError, match=message):
        other.train(snapshots, **{**RECIPES[0], **changes})
    assert_same_state(other.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert torch.equal(other.loader.batch_sampler.generator.get_state(), states[2])
    assert other.events == [] and snapshots.saves == 1


def test_another_loader_or_format_is_refused():
    snapshots = Serialised()
    Run(1, stop=("on_epoch", 1)).train(snapshots, **RECIPES[0])
    data = TensorDataset(torch.randn(128, 3, 16, 16), torch.arange(128) % 10)
    with pytest.raises(UserError, match=r"training\.generator is in it, but not here"):
        train(float_network(), DataLoader(data, 32), EPOCHS, snapshots=snapshots, **RECIPES[0])
    with pytest.raises(UserError, match="batches an epoch was 4 and is 8"):
        train(float_network(), DataLoader(data, 16), EPOCHS, snapshots=snapshots, **RECIPES[0])
    training = training_of(float_network())
    snapshot = capture(training, [])
    with pytest.raises(UserError, match="it has format 0, this version reads 1"):
        restore(training, Snapshot(snapshot.tensors, {"format": 0}))


class Averaging(nn.Module):
    """Keeps a running mean of its input that its state dict does not hold, and adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.mean((0, 2, 3)).reshape(3, 1, 1), 0.1)
        return x + self.mean


def test_buffers_outside_of_the_state_dict_are_put_back():
    first, second = (training_of(nn.Sequential(Averaging(), float_network())) for _ in range(2))
    take_step(first)
    restore(second, round_trip(capture(first, [])))
    assert torch.equal(first.model[0].mean, second.model[0].mean) and first.model[0].mean.any()


class WithExtraState(nn.BatchNorm2d):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_cannot_be_put_back_is_refused_before_training():
    model: Any = float_network()
    model[1] = WithExtraState(16)
    run = Run(1)
    run.model = model
    with pytest.raises(UserError, match=r"1\._extra_state', a dict"):
        run.train(Serialised())
    run = Run(1)
    run.loader = DataLoader(Noisy(), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(UserError, match="persistent_workers=False"):
        run.train(Serialised())
    assert run.events == []
