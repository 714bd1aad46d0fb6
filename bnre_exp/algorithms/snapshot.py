"""State of a training between two epochs: captured, and put back so that it goes on as if it had never stopped."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError

FORMAT = 1
MODEL, BUFFER, OPTIMIZER, RANDOM, MORE = "model/", "buffer/", "optimizer/", "random/", "more/"
GENERATORS = ("generator", "sampler.generator", "batch_sampler.generator", "batch_sampler.sampler.generator")
MAX_DIFFERENCES = 5


@dataclass(frozen=True)
class Snapshot:
    """State of a training after an epoch: tensors by name (on the CPU), and values that JSON holds exactly.

    tensors: contiguous copies of their own, no two share memory. values: plain lists, dicts with string keys, strings
    and Python numbers, so that ``json.loads(json.dumps(values)) == values``; only where a loss was NaN does ``==`` fail
    on it. Neither changes when the training goes on.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    values: dict[str, Any]


class Snapshots(Protocol):
    """Where a training leaves its state after every epoch, and finds it again."""

    def load(self) -> Snapshot | None:
        """The snapshot saved last, bit for bit; None where there is none yet."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` in place of the one before; when this returns, :meth:`load` must find it."""


@dataclass(frozen=True)
class Training:
    """Everything that an epoch changes, and what it must agree with.

    loaders: by role, whatever is iterated in an epoch (None where there is none); of a loader only its
    ``torch.Generator`` objects count. settings: JSON values which must be the same when a training goes on. more:
    tensors besides the network's and the optimizer's, by name, that change in place.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loaders: Mapping[str, Any]
    settings: Mapping[str, Any]
    more: Mapping[str, Tensor] = field(default_factory=dict)


def capture(training: Training, history: list[dict[str, Any]]) -> Snapshot:
    """A snapshot after ``len(history)`` epochs; ``history`` has one dict of JSON values an epoch. Changes nothing.

    Raises ``UserError`` for what cannot be put back: state of a module that is no tensor, or persistent workers, whose
    random states live in other processes. What a module keeps outside of its state dict and buffers is not captured.
    """
    for role, loader in training.loaders.items():
        if getattr(loader, "persistent_workers", False):
            raise UserError(
                f"The {role} loader has persistent workers, whose random states cannot be put back when a training is "
                "resumed; give a loader with persistent_workers=False, or train without snapshots."
            )
    names = _trained_names(training)
    tensors = {**_model_tensors(training.model), **_random_tensors(training.loaders)}
    tensors.update({MORE + name: tensor for name, tensor in training.more.items()})
    strides: dict[str, dict[str, list[int]]] = {}
    for parameter, state in training.optimizer.state.items():
        name = names[parameter]
        strides[name] = {key: list(tensor.stride()) for key, tensor in state.items()}
        tensors.update({f"{OPTIMIZER}{name}/{key}": tensor for key, tensor in state.items()})
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in training.optimizer.param_groups]
    values = {
        "format": FORMAT,
        "epoch": len(history),
        "settings": dict(training.settings),
        "history": history,
        "optimizer": {"groups": groups, "strides": strides},
        "scheduler": training.scheduler.state_dict(),
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
    }
    plain = json.loads(json.dumps(values))  # tuples become lists, and nothing is shared with what goes on changing
    return Snapshot({name: _copy(tensor) for name, tensor in tensors.items()}, plain)


def restore(training: Training, snapshot: Snapshot) -> None:
    """Put everything in ``training`` back, in place, and the global random states with it.

    Parameters and buffers keep their memory format and device; the optimizer's tensors get the format they had, until
    its next step. The
    losses and scores of the epochs so far are in ``snapshot.values["history"]``. Raises ``UserError`` saying what
    differs, and changes nothing, if the snapshot is of another network or was trained otherwise.
    """
    _check_fits(capture(training, []), snapshot, _schemes(training.model))
    _restore_model(training.model, snapshot.tensors)
    _restore_optimizer(training, snapshot)
    for name, tensor in training.more.items():
        tensor.copy_(snapshot.tensors[MORE + name])
    training.scheduler.load_state_dict(copy.deepcopy(snapshot.values["scheduler"]))
    restore_random(training, snapshot)


def restore_random(training: Training, snapshot: Snapshot) -> None:
    """Put back the random states of Python, numpy and torch, and the generators of the loaders; nothing else."""
    version, words, gauss = snapshot.values["random"]["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(snapshot.values["random"]["numpy"])
    torch.set_rng_state(snapshot.tensors[f"{RANDOM}torch"].clone())
    for name, generator in _generators(training.loaders):
        generator.set_state(snapshot.tensors[f"{RANDOM}{name}"].clone())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        state = snapshot.tensors.get(f"{RANDOM}cuda/{index}")
        if state is not None:  # it was captured on a machine with fewer devices, none of which was this one
            torch.cuda.set_rng_state(state.clone(), index)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state dict leaves out."""
    state = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in state}


def restore_hidden_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put back buffers that the state dict leaves out, in place. They are mostly caches that follow the input, so one
    of another shape or dtype is left as it is."""
    for name, buffer in hidden_buffers(model).items():
        value = saved.get(name)
        if value is not None and value.shape == buffer.shape and value.dtype == buffer.dtype:
            buffer.copy_(value)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise UserError(
                f"The network keeps {name!r}, a {type(value).__name__}, in its state dict; only dense tensors can be "
                "put back when a training is resumed. Train it without snapshots."
            )
    hidden = {BUFFER + name: buffer for name, buffer in hidden_buffers(model).items()}
    return {**{MODEL + name: value for name, value in state.items()}, **hidden}


def _restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()  # keeps the versions of the modules, without which old formats would be assumed
    for name in state:
        state[name] = tensors.get(MODEL + name, state[name])  # schemes are absent from old snapshots
    model.load_state_dict(state)
    hidden = {name.removeprefix(BUFFER): value for name, value in tensors.items() if name.startswith(BUFFER)}
    restore_hidden_buffers(model, hidden)


def _trained_names(training: Training) -> dict[Tensor, str]:
    trained = {p for group in training.optimizer.param_groups for p in group["params"]}
    return {p: name for name, p in training.model.named_parameters() if p in trained}


def _restore_optimizer(training: Training, snapshot: Snapshot) -> None:
    saved, optimizer = snapshot.values["optimizer"], training.optimizer
    parameters = {name: parameter for parameter, name in _trained_names(training).items()}
    is_fused = bool(optimizer.param_groups[0].get("fused"))
    optimizer.state.clear()
    for name, strides in saved["strides"].items():
        for key, stride in strides.items():
            tensor = snapshot.tensors[f"{OPTIMIZER}{name}/{key}"]
            # Where AdamW has it: only its fused steps do without the number of steps on the host.
            device = "cpu" if key == "step" and not is_fused else parameters[name].device
            # The strides it had, since those decide the order in which kernels go through it.
            own = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=device)
            optimizer.state[parameters[name]][key] = own.copy_(tensor)
    for group, values in zip(optimizer.param_groups, saved["groups"]):
        for key in values.keys() - {"params", "fused"}:  # how it is computed depends on the parameters that there are
            group[key] = tuple(values[key]) if isinstance(values[key], list) else values[key]  # betas


def _numpy_state() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=False)
    inner = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state["state"].items()}
    return {**state, "state": inner}


def _random_tensors(loaders: Mapping[str, Any]) -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        f"{RANDOM}torch": torch.get_rng_state(),
        **{f"{RANDOM}cuda/{index}": state for index, state in enumerate(cuda)},
        **{f"{RANDOM}{name}": generator.get_state() for name, generator in _generators(loaders)},
    }


def _generators(loaders: Mapping[str, Any]) -> Iterator[tuple[str, torch.Generator]]:
    """Each generator of the loaders once, named after the first place where it was found."""
    seen: set[int] = set()
    for role, loader in loaders.items():
        for path in GENERATORS:
            found = loader
            for attribute in path.split("."):
                found = getattr(found, attribute, None)
            if isinstance(found, torch.Generator) and id(found) not in seen:
                seen.add(id(found))
                yield f"{role}.{path}", found


def _schemes(model: nn.Module) -> set[str]:
    """Names of tensors that are the schemes of quantizers; these are known by an attribute, since what trains a float
    network depends on no file of theirs."""
    return {f"{MODEL}{path}._extra_state" for path, module in model.named_modules() if hasattr(module, "SCHEME")}


def _check_fits(now: Snapshot, then: Snapshot, schemes: set[str]) -> None:
    if then.values.get("format") != FORMAT:
        differences = [f"it has format {then.values.get('format')}, this version reads {FORMAT}"]
    else:
        differences = [
            *_differing_values(now.values, then.values),
            *_differing_tensors(now.tensors, then.tensors, schemes),
        ]
    if differences:
        more = len(differences) - MAX_DIFFERENCES
        listed = "; ".join(differences[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(
            f"The snapshot does not fit this training: {listed}. Train as it was begun, or delete the snapshot to "
            "begin anew."
        )


def _differing_values(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[str]:
    a, b = then["settings"], now["settings"]
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield f"{name} was {a.get(name)!r} and is {b.get(name)!r}"
    for number, (old, new) in enumerate(zip(then["optimizer"]["groups"], now["optimizer"]["groups"])):
        if old["params"] != new["params"]:
            changed = sorted(set(old["params"]) ^ set(new["params"])) or ["their order"]
            yield f"other parameters are trained in group {number}: {', '.join(changed[:MAX_DIFFERENCES])}"


def _differing_tensors(now: Mapping[str, Tensor], then: Mapping[str, Tensor], schemes: set[str]) -> Iterator[str]:
    kinds = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in now.items()}
    for name in sorted(now.keys() | then.keys()):
        if name.startswith((BUFFER, OPTIMIZER, f"{RANDOM}cuda/")):
            continue
        what = name.removeprefix(MODEL).removeprefix(MORE)
        if name in schemes and name not in then:
            continue  # it was taken before schemes were part of the state
        if name not in then:
            yield f"{what} is missing from it"
        elif name not in now:
            yield f"{what} is in it, but not here"
        else:
            dtype, shape = str(then[name].dtype).removeprefix("torch."), tuple(then[name].shape)
            if (dtype, shape) != kinds[name]:
                yield f"{what} was {dtype} {list(shape)} and is {kinds[name][0]} {list(kinds[name][1])}"
            elif name in schemes and not torch.equal(then[name], now[name]):
                yield f"{what} was {then[name].tolist()} and is {now[name].tolist()}"
