"""What is measured, on which network and data, and the clock."""

from __future__ import annotations

import copy
import functools
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

QAT, REESTIMATE, EVALUATE = "QAT step", "re-estimation batch", "evaluation batch"
CALIBRATE_2, CALIBRATE_8 = "calibration, 2 batches", "calibration, 8 batches"
INSERT, FOLD = "insertion", "folding"
STEPS = (QAT, REESTIMATE, EVALUATE, CALIBRATE_2, CALIBRATE_8, INSERT, FOLD)

CLASSES = 10
Step = Callable[[], float]  # does it, and returns the seconds of one (step, batch, call)


@dataclass(frozen=True)
class Case:
    """A network, the shape of its batches (``size`` in pixels), bits, the place, and how many batches are timed a call.

    network: a name of torchvision, timm/NAME, NAME*WIDTH (width multiplier), or an importable MODULE:FUNCTION.
    """

    network: str
    size: int
    batch: int
    weight_bits: int = 4
    act_bits: int = 8
    device: str = "cpu"
    timed: int = 2

    @property
    def name(self) -> str:
        bits = f"w{self.weight_bits}a{self.act_bits}"
        return f"{self.network} {self.size}×{self.size}, batch {self.batch}{f', {bits}' if bits != 'w4a8' else ''}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def network_of(self, channels_last: bool = True) -> nn.Module:
        """A copy of the network, the same weights and statistics every time."""
        model = copy.deepcopy(_network(self))
        return model.to(memory_format=torch.channels_last) if channels_last else model

    def batches(self, channels_last: bool = True) -> list[tuple[Tensor, Tensor]]:
        """Two batches of images ``[N, 3, size, size]`` and labels ``[N]``, on the device."""
        return [(x.to(memory_format=torch.channels_last) if channels_last else x, y) for x, y in _batches(self)]

    def images(self, channels_last: bool = True) -> list[Tensor]:
        return [x for x, _ in self.batches(channels_last)]


@functools.lru_cache(maxsize=2)
def _batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    return [
        (
            torch.randn(shape, generator=generator).to(case.device),
            torch.randint(0, CLASSES, (case.batch,), generator=generator).to(case.device),
        )
        for _ in range(2)
    ]


@functools.lru_cache(maxsize=2)
def _network(case: Case) -> nn.Module:
    """Random weights, with BN statistics that fit: else activations vanish with depth, and such numbers are slow."""
    torch.manual_seed(0)
    name, _, width = case.network.partition("*")
    if ":" in name:
        model = pkgutil.resolve_name(name)()
    elif name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), num_classes=CLASSES)
    else:
        model = torchvision.models.get_model(
            name, num_classes=CLASSES, **({"width_mult": float(width)} if width else {})
        )
    model = model.to(case.device)
    update_bn([x for x, _ in _batches(case)], model)
    return model.eval()


class Clock:
    """A loader that notes when it is asked for a batch: the seconds of one are those between two requests.

    The first batch is not timed, so that what is done once a call (copies, checks, an optimizer's state) is left out.
    extra: 1 for a function that takes as many batches as it is told and so does not ask after the last one.
    """

    def __init__(self, batches: Sequence[Any], timed: int, device: str, extra: int = 0) -> None:
        self.batches, self.timed, self.device, self.extra = batches, timed, device, extra
        self.noted: list[float] = []

    def __len__(self) -> int:
        return 1 + self.timed + self.extra

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            self._note(index)
            yield self.batches[index % len(self.batches)]
        self._note(len(self))

    def _note(self, index: int) -> None:
        if index in (1, 1 + self.timed) and len(self.noted) < 2:
            self.noted.append(now(self.device))

    @property
    def seconds(self) -> float:
        """Of one batch."""
        if len(self.noted) < 2:
            raise RuntimeError("the function that is timed took fewer batches than it was given")
        return (self.noted[1] - self.noted[0]) / self.timed


def now(device: str) -> float:
    """Seconds on a steady clock, once all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def a_batch(function: Callable[[Clock], Any], case: Case, batches: Sequence[Any], extra: int = 0) -> Step:
    """The step that gives ``function`` a loader, and returns the seconds of a batch within it."""

    def step() -> float:
        clock = Clock(batches, case.timed, case.device, extra)
        function(clock)
        return clock.seconds

    return step


def a_call(function: Callable[..., Any], case: Case, prepare: Callable[[], Any] | None = None) -> Step:
    """The step that returns the seconds of a whole call, of what ``prepare`` returns if there is that."""

    def step() -> float:
        arguments = () if prepare is None else (prepare(),)
        began = now(case.device)
        function(*arguments)
        return now(case.device) - began

    return step


def many(batches: Sequence[Any], count: int) -> list[Any]:
    """So many batches, repeated as needed."""
    return [batches[index % len(batches)] for index in range(count)]
