"""A network whose state stays what it is while batches go through it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnre_exp.errors import UserError

logger = logging.getLogger(__name__)
# Buffers of torch.ao's fake quantizers that say whether a call moves the range; those that learn it have the second.
OBSERVING = ("observer_enabled", "static_enabled")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within the block, observers of foreign quantizers are off; in the end every parameter and buffer is as before.

    What a module moved all the same is put back and named in a warning. Buffers that were added, or have another shape
    or type than before, are left: those are caches that follow the input, about which their module keeps books. Takes
    the memory of a copy of the network. Raises ``UserError`` naming a quantizer that has no range yet.
    """
    with torch.no_grad():
        before = _remember(model)
    with ExitStack() as stack:
        stack.callback(_put_back, before)
        for name, module in model.named_modules():
            _switch_off(name, module, stack)
        yield


@dataclass(frozen=True)
class _Kept:
    """A tensor of a module: where it is registered, itself, and a copy of its values."""

    owner: str
    place: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    values: Tensor


def _remember(model: nn.Module) -> list[_Kept]:
    copies: dict[int, Tensor] = {}  # one of each tensor that is tied
    kept = []
    for path, module in model.named_modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name, tensor in place.items():
                if tensor is not None and not is_lazy(tensor) and not tensor.is_meta:
                    values = copies.setdefault(id(tensor), tensor.detach().clone())
                    kept.append(_Kept(path, place, name, tensor, values))
    return kept


@torch.no_grad()
def _put_back(before: list[_Kept]) -> None:
    moved = []
    for each in before:
        now = each.place.get(each.name)
        if now is None or now.shape != each.values.shape or now.dtype != each.values.dtype:
            continue
        if not _same(now, each.values):
            moved.append(f"{each.owner}.{each.name}".lstrip("."))
        if not _same(each.tensor, each.values):
            each.tensor.copy_(each.values)
        each.place[each.name] = each.tensor
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        logger.warning(
            "%s%s changed in evaluation mode while batches went through the network, and were put back",
            ", ".join(moved[:3]), more,
        )  # fmt: skip


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _switch_off(name: str, module: nn.Module, stack: ExitStack) -> None:
    for key in OBSERVING:
        flag = getattr(module, key, None)
        if not isinstance(flag, Tensor) or not bool(flag.any()):
            continue
        low = getattr(getattr(module, "activation_post_process", None), "min_val", None)
        if isinstance(low, Tensor) and (not low.numel() or bool(low.isinf().any())):
            raise UserError(
                f"The quantizer {name} ({type(module).__name__}) has seen no data yet, so it has no range; run the "
                "network on some training data with its observers on, then re-estimate."
            )
        stack.callback(flag.copy_, flag.clone())
        flag.zero_()


def warn_of_stale_ranges(model: nn.Module, results: Mapping[Any, tuple[Tensor, Tensor]]) -> None:
    """Name, in a warning, layers whose weight is rounded after it was multiplied by gamma / sigma, as torch.ao's ConvBn
    do: the range was fitted with the old sigma, and is no part of the statistics.

    results: new mean and variance by batch norm, which still has the old ones.
    """
    names, largest = [], 0.0
    for name, module in model.named_modules():
        bn: Any = module._modules.get("bn")
        if bn in results and hasattr(module, "weight_fake_quant"):
            growth = ((bn.running_var + bn.eps) / (results[bn][1] + bn.eps)).sqrt()
            names.append(name)
            largest = max(largest, float(growth.max()))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning(
            "%s%s: their weights are rounded after they were multiplied by gamma / sigma, which is up to %.3g times as "
            "large with the new statistics, on ranges of the old ones; let the observers of these weights see a batch "
            "before the network is used",
            ", ".join(names[:3]), more, largest,
        )  # fmt: skip
