"""Random cases for the whole way of the library: a network, its dtype, what is done to it, a scheme, and batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, IterableDataset
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp import QuantScheme, calibrate, fold_batch_norms, quantize
from tests.networks import randomize

SIZES = (4, 3, 5)  # samples of the batches
LAYERS = ("conv", "one_output", "depthwise", "transposed", "grouped")
NORMS = ("bn", "bn", "bn", "plain_bn", "stateless_bn", "frozen_bn", "functional_bn")
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "gelu")
OTHERS = ("add", "concat", "dropout", "max_pool2d", "avg_pool2d")


def times(examples: int) -> int:
    """So many examples, or BNRE_FUZZ times as many."""
    return round(examples * float(os.environ.get("BNRE_FUZZ", "1")))


class Network(nn.Module):
    """Operations one after another on images of five by five, mean over the image, four logits. "add" and "concat" also
    read the network's input."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds, channels = kinds, 3
        for index, kind in enumerate(kinds):
            module, channels = _module(kind, channels)
            if module is not None:
                self.add_module(f"{kind}{index}", module)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        given = x
        for index, kind in enumerate(self.kinds):
            name = f"{kind}{index}"
            if kind == "concat":
                x = torch.cat([x, given], 1)
            elif kind == "add":
                x = x + given.mean(1, keepdim=True)
            elif kind.endswith("pool2d"):
                x = getattr(F, kind)(x, 3, stride=1, padding=1)
            else:
                x = getattr(self, name)(x) if hasattr(self, name) else getattr(F, kind)(x)
        return self.head(x.flatten(2).mean(2))


class FunctionalBN(nn.Module):
    """A batch norm written as a call with the network's own buffers and parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, channels))
        self.register_buffer("variance", torch.linspace(0.5, 2, channels))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, False)


def _module(kind: str, channels: int) -> tuple[nn.Module | None, int]:
    """A module for ``channels`` channels and the number that it gives; None where the operation is a function."""
    if kind == "concat":
        return None, channels + 3
    made: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "conv": lambda: (nn.Conv2d(channels, 6, 3, padding=1), 6),
        "one_output": lambda: (nn.Conv2d(channels, 1, 3, padding=1, bias=False), 1),
        "depthwise": lambda: (nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), channels),
        "transposed": lambda: (nn.ConvTranspose2d(channels, 5, 3, padding=1), 5),
        "grouped": lambda: (nn.Conv2d(channels, 2 * channels, 1, groups=channels), 2 * channels),
        "bn": lambda: (nn.BatchNorm2d(channels), channels),
        "plain_bn": lambda: (nn.BatchNorm2d(channels, affine=False), channels),
        "stateless_bn": lambda: (nn.BatchNorm2d(channels, track_running_stats=False), channels),
        "frozen_bn": lambda: (FrozenBatchNorm2d(channels), channels),
        "functional_bn": lambda: (FunctionalBN(channels), channels),
        "dropout": lambda: (nn.Dropout(0.2), channels),
    }
    return made[kind]() if kind in made else (None, channels)


class NormEval(Network):
    """Keeps its batch norms in evaluation mode, as detectors that are fine-tuned do."""

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def _frozen(model: Network) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _norm_eval(model: Network) -> nn.Module:
    other = NormEval(model.kinds).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other.train()


def _pruned(model: Network) -> nn.Module:
    prune.l1_unstructured(model.head, "weight", amount=0.3)
    return model


def _normed(model: Network) -> nn.Module:
    parametrizations.weight_norm(model.head)
    return model


def _lazy(model: Network) -> nn.Module:
    return nn.Sequential(model, nn.LazyLinear(4))


def _simulated(model: Network) -> nn.Module:
    return quantize(model, torch.randn(2, 3, 5, 5, dtype=next(model.parameters()).dtype))


def _folded(model: Network) -> nn.Module:
    x, sim = torch.randn(2, 3, 5, 5, dtype=next(model.parameters()).dtype), _simulated(model)
    calibrate(sim, [x], 1)
    return fold_batch_norms(sim)[0]


def _traced(model: Network) -> nn.Module:
    return torch.jit.trace(model.eval(), torch.randn(2, 3, 5, 5, dtype=next(model.parameters()).dtype))


def _of_inference(model: Network) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(model)


# What is done to a network before it is given; the first ones are to work, the others to be refused.
WORKING: dict[str, Callable[[Network], nn.Module]] = {
    "eval": lambda model: model.eval(),
    "train": lambda model: model.train(),
    "frozen": _frozen,
    "norm_eval": _norm_eval,
    "data_parallel": lambda model: nn.DataParallel(model),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "of_inference": _of_inference,
}
OTHER: dict[str, Callable[[Network], nn.Module]] = {
    "pruned": _pruned,
    "weight_norm": _normed,
    "lazy": _lazy,
    "on_meta": lambda model: model.to("meta"),
    "simulated": _simulated,
    "folded": _folded,
    "traced": _traced,
}


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Stream(IterableDataset):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _inference(x: Tensor, y: Tensor) -> Any:
    with torch.inference_mode():
        return x.clone(), y.clone()


def _spoiled(value: float) -> Callable[[Tensor, Tensor], Any]:
    def batch(x: Tensor, y: Tensor) -> Any:
        x = x.clone()
        x.view(-1)[7] = value
        return x, y

    return batch


# How samples are put into a batch; the first ones are to work, the others to be refused.
FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named": Pair,
    "inference": _inference,
}
ODD_FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "images alone": lambda x, y: x,
    "dict": lambda x, y: {"image": x, "label": y},
    "meta": lambda x, y: (x, torch.arange(len(x)), y),
    "nan": _spoiled(float("nan")),
    "inf": _spoiled(float("inf")),
    "nothing": lambda x, y: (x[:0], y[:0]),
    "float labels": lambda x, y: (x, y + 0.5),
    "labels beyond": lambda x, y: (x, y + 4),
    "numpy": lambda x, y: ((x.float() if x.dtype.itemsize == 2 else x).numpy(), y.numpy()),
    "text": lambda x, y: "image",
    "none": lambda x, y: None,
}
LOADERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda batches: batches,
    "loader": lambda batches: DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
    "stream": lambda batches: DataLoader(Stream(batches), batch_size=None),
    "iterator": iter,
}


CONVERTING = ("loader", "stream")  # a DataLoader makes tensors of numpy's arrays
# What is said of each that is refused, as a regular expression.
SAID = {
    "images alone": "no labels", "dict": "forward_fn|target_fn", "meta": "target_fn", "nan": "not finite|became nan",
    "inf": "not finite|became (nan|inf)", "nothing": "no samples", "float labels": "float", "labels beyond": "classes",
    "numpy": "forward_fn", "text": "forward_fn", "none": "forward_fn",
    "pruned": "prune", "weight_norm": "parametrization", "lazy": "lazy", "on_meta": "meta device",
    "simulated": "simulation", "folded": "folded network", "traced": "TorchScript",
    torch.float16: "half precision", torch.bfloat16: "half precision",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One case; see the tables of this file for what the names mean. seed: of weights and data."""

    kinds: tuple[str, ...]
    dtype: torch.dtype
    given: str
    scheme: QuantScheme
    form: str
    loader: str
    seed: int

    @property
    def refusals(self) -> list[str]:
        """What may be said of the case, as regular expressions; none if it is to work."""
        form = "tuple" if self.form == "numpy" and self.loader in CONVERTING else self.form
        return [SAID[odd] for odd in (self.dtype, self.given, form) if odd in SAID]

    def model(self) -> nn.Module:
        """A new network, as it is given to ``quantize``."""
        torch.manual_seed(self.seed)
        model = randomize(Network(self.kinds), self.seed).to(self.dtype)
        return (WORKING | OTHER)[self.given](model)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [torch.randn(size, 3, 5, 5, generator=generator).to(self.dtype) * 2 + 0.3 for size in SIZES]

    def batches(self, is_odd: bool = True) -> Any:
        """A loader of all batches; the last of them alone has the odd form unless that is left out."""
        form, samples = (FORMS | ODD_FORMS)[self.form], [(x, torch.arange(len(x)) % 4) for x in self.inputs()]
        made = [form(*pair) if self.form in FORMS or (is_odd and pair is samples[-1]) else pair for pair in samples]
        return LOADERS[self.loader](made)


SCHEMES = st.builds(
    QuantScheme,
    weight_bits=st.sampled_from([2, 3, 4, 8, 16, None]),
    act_bits=st.sampled_from([2, 4, 8, 16, None]),
    per_channel=st.booleans(),
    range_learning=st.booleans(),
    weight_grid=st.sampled_from(["narrow", "full"]),
    weight_range=st.sampled_from(["mse", "minmax", "percentile"]),
    act_range=st.sampled_from(["mse", "minmax", "percentile"]),
    first_last_bits=st.sampled_from([None, 8]),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Half of the cases are to work; the others have odd batches, dtypes or networks."""
    blocks = st.tuples(st.sampled_from(LAYERS), st.sampled_from(NORMS), st.sampled_from(ACTIVATIONS))
    kinds = [kind for block in draw(st.lists(blocks, min_size=1, max_size=3)) for kind in block]
    for other in draw(st.lists(st.sampled_from(OTHERS), max_size=2)):
        kinds.insert(draw(st.integers(0, len(kinds))), other)
    is_odd = draw(st.booleans())
    half = [torch.float16, torch.bfloat16]
    return Case(
        tuple(kinds),
        draw(st.sampled_from([torch.float32, torch.float32, torch.float64, *(half if is_odd else [])])),
        draw(st.sampled_from([*WORKING, *(OTHER if is_odd else {})])),
        draw(SCHEMES),
        draw(st.sampled_from([*FORMS, *(ODD_FORMS if is_odd else {})])),
        draw(st.sampled_from([*LOADERS])),
        draw(st.integers(0, 999)),
    )
