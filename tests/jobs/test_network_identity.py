"""What tells two networks apart: everything that they compute with; and what does not: processes, order, addresses."""

from __future__ import annotations

import enum
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp.jobs.network_identity import network_identity

EXAMPLE = torch.zeros(2, 3, 8, 8)
SETTINGS = {"slope": 0.1}


class Kind(enum.Enum):
    SUM = "sum"
    MEAN = "mean"


@dataclass
class How:
    slope: float = 0.1
    kinds: set[str] = field(default_factory=lambda: {"a", "b", "c"})


class Holds(nn.Module):
    """A network that holds one value, which no other attribute shows. traced: whether it can be traced."""

    def __init__(self, value: Any, traced: bool = True) -> None:
        super().__init__()
        self.conv, self.value, self.traced = nn.Conv2d(3, 4, 3), value, traced

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if not self.traced and x.sum() > 0:  # no graph has this
            return x + 1
        return x


class ReadsGlobal(Holds):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(super().forward(x), SETTINGS["slope"])


def enclosing(slope: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.leaky_relu(x, slope)


class Thing:
    def __init__(self, slope: float) -> None:
        self.slope, self.name = slope, "x"


class Steps(nn.Module):
    def __init__(self, steps: int, slope: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        object.__setattr__(self, "hidden", lambda x: self.conv(F.leaky_relu(x, slope)) * steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x)


def shared(part: nn.Module) -> list[nn.Module]:
    return [part, part]


def identity(network: nn.Module) -> str:
    found, unknown = network_identity(network, EXAMPLE, ())
    assert unknown == []
    return found


PAIRS: dict[str, tuple[Any, Any]] = {
    "number": (0.1, 0.10000001),
    "type": (1, 1.0),
    "boolean": (1, True),
    "text": ("relu", "silu"),
    "tuple and list": ((1, 2), [1, 2]),
    "set": ({"a", "b"}, {"a", "c"}),
    "dict": ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
    "enum": (Kind.SUM, Kind.MEAN),
    "dataclass": (How(), How(0.2)),
    "namespace": (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    "plain object": (Thing(0.1), Thing(0.2)),
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])),
    "array": (torch.ones(2).numpy(), torch.zeros(2).numpy()),
    "dtype": (torch.float32, torch.float64),
    "closure": (enclosing(0.1), enclosing(0.2)),
    "lambda": (lambda x: x * 2, lambda x: x * 3),
    "partial": (functools.partial(F.leaky_relu, inplace=False), functools.partial(F.leaky_relu, inplace=True)),
    "function": (F.relu, F.silu),
    "class": (nn.ReLU, nn.SiLU),
    "module in a list": ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.2)]),
    "module": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "range": (range(3), range(4)),
    "bound method": (nn.LeakyReLU(0.1).forward, nn.LeakyReLU(0.2).forward),
}  # fmt: skip


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_what_a_module_holds_is_part_of_it(pair, traced):
    first, second = (identity(Holds(value, traced)) for value in pair)
    assert first == identity(Holds(pair[0], traced)) != second


def test_constants_that_only_the_graph_shows():
    assert identity(Steps(2, 0.1)) == identity(Steps(2, 0.1))
    assert len({identity(Steps(*with_)) for with_ in [(2, 0.1), (3, 0.1), (2, 0.2)]}) == 3


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_globals_that_forward_reads(monkeypatch, traced):
    before = identity(ReadsGlobal(None, traced))
    monkeypatch.setitem(SETTINGS, "slope", 0.2)
    assert identity(ReadsGlobal(None, traced)) != before


def test_hooks_modes_and_what_is_shared_count():
    plain, hooked, frozen = Holds(1), Holds(1), Holds(1)
    hooked.conv.register_forward_hook(lambda module, given, output: output * 2)
    frozen.conv.eval()
    several = [identity(network) for network in (plain, hooked, frozen)]
    assert len(set(several)) == 3
    again = Holds(1)
    again.register_forward_hook(lambda module, given, output: output).remove()  # other keys for hooks from now on
    again.conv.register_forward_hook(lambda module, given, output: output * 2)
    assert identity(again) == several[1]
    assert identity(nn.Sequential(*shared(nn.Conv2d(3, 3, 1)))) != identity(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    )


def test_weights_are_not_part_of_it_and_the_network_stays_as_it_was():
    torch.manual_seed(0)
    first = Holds([1])
    first.train()
    state, held = {name: value.clone() for name, value in first.state_dict().items()}, dict(vars(first))
    assert identity(first) == identity(Holds([1]))
    assert first.training and vars(first) == held
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


class Opaque:
    """Nothing says what it holds; yet it can be copied, as a network must be that is quantized."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError

    def __deepcopy__(self, memo: object) -> Opaque:
        return self


def test_an_object_without_content_decides_nothing_where_the_graph_shows_all():
    assert identity(Holds(Opaque())) == identity(Holds(Opaque()))
    assert network_identity(Holds(Opaque(), traced=False), EXAMPLE, ())[1] == [f"{__name__}.Opaque"]
    assert network_identity(Holds(threading.Lock(), traced=False), EXAMPLE, ())[1] == ["_thread.lock"]


def test_values_that_hold_themselves():
    endless: list[Any] = [1]
    endless.append(endless)
    assert identity(Holds(endless)) == identity(Holds(endless))


PROGRAM = """
from tests.jobs.test_network_identity import *
values = [How(), {"x", "y", "z"}, enclosing(0.1), lambda x: x in {"a", "b", "c"}, Thing(0.1), Opaque()]
print([identity(Holds(value)) for value in values], identity(ReadsGlobal(frozenset({"p", "q"}), False)))
"""


@pytest.mark.slow
def test_the_same_in_every_process():
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        program = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(program.stdout)
    assert len(outputs) == 1


def test_which_parameters_are_trained_tells_networks_apart():
    frozen = Holds(None)
    frozen.conv.weight.requires_grad_(False)
    assert network_identity(frozen, EXAMPLE, ())[0] != network_identity(Holds(None), EXAMPLE, ())[0]
