"""Does a traced network behave as its original, in evaluation and training mode and at two batch sizes?"""

from __future__ import annotations

import copy
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.tracing.frozen import META, set_mode
from bnre_exp.quantsim.tracing.network import TracedNetwork
from bnre_exp.quantsim.tracing.tracer import resized

LARGEST_BATCH = 4  # more would only take longer
TOLERANCE = 1e-4  # relative to the largest value of a tensor; a wrong graph is off by far more


class Comparison:
    """Outputs of a traced network beside those of its original; neither is changed.

    notes: what the traced network lacks by design (auxiliary outputs of the training mode).
    """

    def __init__(self, original: nn.Module, traced: TracedNetwork, inputs: Sequence[Tensor]) -> None:
        self.notes: tuple[str, ...] = ()
        self._names = _leaf_names(original) & _leaf_names(traced)
        self._frozen = traced.meta.get(META, frozenset())
        self._has_training_graph = traced.training_graph is not None
        self._networks, self._inputs = (_prepared(original), _prepared(traced)), inputs

    def check(self, training: bool) -> None:
        """Compare in one mode, at two batch sizes. Raises ``UserError`` naming the first module that differs."""
        first, second = self._networks
        how = (training, self._frozen, self._names)
        for batch in _two_batches(self._inputs):
            expected, wanted = _record(first, batch, *how, "the network itself")
            actual, got = _record(second, batch, *how, "the traced network")
            is_first_of_many = _is_one_tensor(actual) and not _is_one_tensor(expected)
            if training and is_first_of_many and not self._has_training_graph:
                expected = next(iter(_tensors(expected)))
                self.notes = ("outputs beyond the first, given in training mode only (auxiliary heads), are dropped",)
            if not any(True for _ in _tensors(expected)):
                raise UserError(
                    f"The network returns {type(expected).__name__}, in which no tensor was found; expected a tensor, "
                    "or tuples, lists and dicts of tensors."
                )
            if not _same(expected, actual):
                mode = "training" if training else "evaluation"
                raise UserError(
                    f"The traced network differs from the original in {mode} mode with a batch of {len(batch[0])}: "
                    f"{_first_difference(wanted, got)}. Tracing cannot follow what depends on the batch size or on "
                    "values; keep the module that does so whole with leaf_modules=[its name or class]."
                )


def _two_batches(inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    count = min(max(2, inputs[0].shape[0]), LARGEST_BATCH)
    for size in (count, count + 1):
        yield tuple(resized(x, size) for x in inputs)


def _is_one_tensor(output: Any) -> bool:
    return isinstance(output, Tensor)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _same(a: Any, b: Any) -> bool:
    first, second = list(_tensors(a)), list(_tensors(b))
    if len(first) != len(second):
        return False
    for x, y in zip(first, second):
        if x.shape != y.shape:
            return False
        if x.is_floating_point():
            finite = x.detach()[x.detach().isfinite()]
            limit = TOLERANCE * max(1e-12, float(finite.abs().amax())) if finite.numel() else 0.0
            if not torch.allclose(x, y, rtol=0, atol=limit, equal_nan=True):
                return False
        elif not torch.equal(x, y):
            return False
    return True


Outputs = dict[tuple[str, int], Any]


def _leaf_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if name and not any(True for _ in module.children())}


@torch.no_grad()
def _prepared(model: nn.Module) -> nn.Module:
    """A copy without parameters of zeros: behind a head or gamma of zeros every difference would vanish."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.any()):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def _record(
    model: nn.Module, inputs: Sequence[Tensor], training: bool, frozen: Collection[str], names: set[str], where: str
) -> tuple[Any, Outputs]:
    """Run the network and keep the outputs of the modules in ``names``, which both networks have. Random numbers start
    anew before each of them, so that those drawn in a dropped head shift nothing."""
    set_mode(model, training, frozen)
    outputs: Outputs = {}
    calls: dict[str, int] = defaultdict(int)
    with torch.random.fork_rng(devices=_cuda_devices(inputs)), torch.no_grad(), _hooked(model, names, outputs, calls):
        _seed(0)
        try:
            return model(*(x.clone() for x in inputs)), outputs  # which it may change
        except Exception as error:
            mode = "training" if training else "evaluation"
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise UserError(
                f"{where[0].upper()}{where[1:]} fails in {mode} mode on inputs of shape {shapes}: {error}"
            ) from error


def _cuda_devices(inputs: Sequence[Tensor]) -> list[int]:
    return sorted({x.device.index or 0 for x in inputs if x.device.type == "cuda"})


def _seed(seed: int) -> None:
    """torch.manual_seed without its bookkeeping, which takes a millisecond."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _hooked(model: nn.Module, names: set[str], outputs: Outputs, calls: dict[str, int]) -> Iterator[None]:
    handles = []
    for name in sorted(names):
        module = model.get_submodule(name)

        def before(_: nn.Module, __: Any, name: str = name) -> None:
            _seed(zlib.crc32(name.encode()) + calls[name])

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            outputs[name, calls[name]] = [x.clone() for x in _tensors(output)]
            calls[name] += 1

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(wanted: Outputs, got: Outputs) -> str:
    last: str | None = None
    for (name, call), output in wanted.items():
        if (name, call) in got:
            if not _same(output, got[name, call]):
                after = f" (the last that agrees is {last!r})" if last else ""
                return f"the first module whose output differs is {name!r}{after}"
            last = name
    return f"they part after module {last!r}" if last else "they differ from the start"
