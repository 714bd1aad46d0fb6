"""How algorithms take batches from a user's loader and feed them to a network."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.quantsim.whole import parts_of
from bnre_exp.tasks.task import first_input

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass
class Passes:
    """How far :func:`take_batches` has come: batches taken, and passes over the loader begun."""

    batches: int = field(default=0)
    passes: int = field(default=0)


def take_batches(loader: Iterable[Any], num_batches: int, count: Passes | None = None) -> Iterator[Any]:
    """Yield exactly ``num_batches`` batches; a loader that is shorter is iterated again.

    ``count`` is kept up to date. Raises ``UserError`` if num_batches is below 1 or the loader yields nothing (an
    iterator that cannot be restarted yields nothing the second time).
    """
    check_num_batches(num_batches)
    count = count if count is not None else Passes()
    while count.batches < num_batches:
        count.passes += 1
        before = count.batches
        for batch in loader:
            count.batches += 1
            yield batch
            if count.batches == num_batches:
                return
        if count.batches == before:
            again = f" after the first {before}" if before else ""
            raise UserError(
                f"The data loader yields no batches{again}, but {num_batches} are needed; give a loader that is not "
                "empty and can be iterated again, or a smaller number of batches."
            )


class FirstSamples:
    """The first samples of a loader whose batches are tuples or lists of an input and a target, each ``[N, ...]`` or a
    list of N; the last batch is cut to fit."""

    def __init__(self, loader: Iterable[Any], samples: int) -> None:
        self._loader, self._samples = loader, samples

    def __iter__(self) -> Iterator[Any]:
        left = self._samples
        for batch in self._loader:
            count = samples_in(batch)
            yield batch if count <= left else type(batch)(part[:left] for part in batch)
            left -= count
            if left <= 0:
                return


def check_num_batches(num_batches: Any) -> None:
    """Raise ``UserError`` unless it is a whole number of at least 1."""
    if not is_whole(num_batches) or num_batches < 1:
        raise UserError(f"num_batches={num_batches!r}: expected at least 1, as a whole number (all: len(dataloader)).")


def feed(model: nn.Module, batch: Any, device: torch.device, forward_fn: ForwardFn | None = None) -> Any:
    """Run the model on a batch: a tensor as it is, of a tuple or list the first element, moved to ``device``.

    ``forward_fn(model, batch)`` replaces that for other batches; tensors at the top level of its batch are moved too.
    Raises ``UserError`` naming ``forward_fn`` for batches of any other kind.
    """
    if forward_fn is not None:
        return forward_fn(model, to_device(batch, device))
    return model(to_device(first_input(batch), device))


def samples_in(batch: Any) -> int:
    """The length of the first tensor in a batch, at any depth; 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((found for found in map(samples_in, items) if found), 0)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; tuples, lists and dicts are looked into.

    Tensors made under ``torch.inference_mode`` are cloned outside of it, since autograd refuses them.
    """
    if isinstance(batch, Tensor):
        moved = batch.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python or numpy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives. Raises ``UserError`` for one without values, and for what is
    no network."""
    if not isinstance(model, nn.Module):
        raise UserError(f"Expected a network, a torch.nn.Module, got {type(model).__name__}.")
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        raise UserError(
            "The network is on the meta device and has no values; load the weights first (to_empty, assign)."
        )
    return device


def length_of(dataloader: Iterable[Any]) -> int | None:
    """Batches of a loader, None where it has no length. (Every DataLoader has ``__len__``; over an IterableDataset it
    raises.)"""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def as_many(dataloader: Iterable[Any], length: int) -> Iterator[Any]:
    """The batches of a loader that is said to have so many. Raises ``UserError`` when it yields more or fewer."""
    count = 0
    for count, batch in enumerate(dataloader, start=1):
        if count > length:
            raise UserError(_other_length(length, "yields more"))
        yield batch
    if count < length:
        raise UserError(_other_length(length, f"yields {count}"))


def _other_length(length: int, what: str) -> str:
    return (
        f"The length of the data loader is {length} batches, but it {what}, and the schedule goes by their number; "
        'correct its __len__, pass steps_per_epoch, or take schedule="constant" and no dampening or freezing.'
    )


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters and batch-norm statistics that hold NaN or infinity."""
    state = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            state[f"{name}.running_mean"], state[f"{name}.running_var"] = module.running_mean, module.running_var  # type: ignore[assignment]
    if not state:
        return []
    device = next(iter(state.values())).device  # all are looked at in one go: a device answers slowly
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in state.values()]).tolist()
    return [name for name, is_finite in zip(state, finite) if not is_finite]


def patience(device: torch.device) -> int:
    """After how many batches results are looked at: on a CPU each, elsewhere few, since looking waits for them."""
    return 1 if device.type == "cpu" else 16


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each back in the mode it was in, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


def is_ours(forward_fn: ForwardFn | None) -> bool:
    """Whether a network is fed by a function of this package, which calls it once and looks at nothing else of it."""
    return forward_fn is None or str(forward_fn.__module__).startswith("bnre_exp.")


@contextmanager
def cached_weights(model: nn.Module, forward_fn: ForwardFn | None = None) -> Iterator[None]:
    """Quantize each weight once for the whole block. Only for graphs of ours, under ``no_grad``, and while weights do
    not change: the cache of parametrize is global and knows no invalidation; never around a user's ``forward_fn``."""
    is_graph = isinstance(model, fx.GraphModule) or bool(parts_of(model))
    if is_ours(forward_fn) and is_graph and not torch.is_grad_enabled():
        with parametrize.cached():
            yield
    else:
        yield
