"""A process that loads an exported file anew and predicts with it: what the pool of :mod:`.reload` runs there."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from bnre_exp.errors import UserError
from bnre_exp.files import work_folder

TIMED_RUNS, TIMED_SECONDS = 50, 2.0
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QLinearConvTranspose")
LAYERS = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")

# What loading a checkpoint imports, which takes seconds: done while the parent still makes the files.
NEEDED = ("bnre_exp.algorithms.integers", "bnre_exp.export.checkpoint.save_load", "bnre_exp.models.build")

Arrays = list[np.ndarray]  # the inputs of a network, or its outputs, in order
Predict = Callable[[Arrays], Arrays]
Describe = Callable[[Arrays], dict[str, float]]


def load_checkpoint(request: Mapping[str, Any]) -> tuple[Predict, Describe]:
    """A folded checkpoint, in torch, computed on integers. request: path, device; model: how to build what the
    checkpoint does not hold; part: of that, where the checkpoint is that of a part."""
    from bnre_exp.algorithms.integers import integer_simulation
    from bnre_exp.export.checkpoint.save_load import load_folded
    from bnre_exp.models.build import build_model

    model = build_model(**request["model"]).module.eval() if request.get("model") else None
    model = model.get_submodule(request["part"]) if model is not None and request.get("part") else model
    network = integer_simulation(load_folded(request["path"], model).to(request["device"])).eval()

    def predict(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = tree_leaves(network(*(torch.from_numpy(x).to(request["device"]) for x in inputs)))
        return [(x.float() if x.is_floating_point() else x).cpu().numpy() for x in outputs]

    return predict, lambda _: {}


def load_onnx(request: Mapping[str, Any]) -> tuple[Predict, Describe]:
    """An ONNX model, in ONNX Runtime. request: path; float: path of the network in floating point, to compare times."""
    from bnre_exp.onnx_io.files import load_model

    return _session(load_model(request["path"]), request.get("float"))


def load_encodings(request: Mapping[str, Any]) -> tuple[Predict, Describe]:
    """A plain ONNX model with quantizers put in as a file of encodings says. request: path (of the folder), version."""
    import onnx_ir as ir

    from bnre_exp.export.encodings import read_encodings
    from bnre_exp.export.onnx.qdq import insert_qdq

    plain = read_encodings(Path(request["path"]), request["version"])
    return _session(ir.to_proto(insert_qdq(plain, int4=False)), None)


LOADERS = {"checkpoint": load_checkpoint, "onnx": load_onnx, "encodings": load_encodings}


def _session(model: Any, float_path: str | None) -> tuple[Predict, Describe]:
    from bnre_exp.onnx_io.files import load_model
    from bnre_exp.onnx_io.session import open_session

    with work_folder() as folder:
        optimized = folder / "optimized.onnx"
        session = open_session(model, optimized_to=optimized)
        kinds = Counter(node.op_type for node in load_model(optimized).graph.node)
    integer, floating = (sum(kinds[kind] for kind in those) for those in (INTEGER_KERNELS, LAYERS))

    def predict(inputs: Arrays) -> Arrays:
        return list(session.run(None, _named(session, inputs)))

    def describe(inputs: Arrays) -> dict[str, float]:
        known = {"integer_layers": float(integer), "float_layers": float(floating)}
        if float_path is not None:
            times = _interleaved([session, open_session(load_model(float_path))], inputs)
            known.update(zip(("milliseconds", "fp32_milliseconds"), times))
        return known

    return predict, describe


def _named(session: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    """Inputs by name. Raises ``UserError`` where they do not fit."""
    from bnre_exp.onnx_io.session import feeds

    return feeds(session, dict(zip((item.name for item in session.get_inputs()), inputs)))


def _interleaved(sessions: list[Any], given: Arrays) -> list[float]:
    """The median time of one run of each session [ms]; they take turns, since other work disturbs both."""
    inputs = [_named(session, given) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    until = time.perf_counter() + TIMED_SECONDS
    for count in range(TIMED_RUNS + 2):
        for session, named, taken in zip(sessions, inputs, times):
            started = time.perf_counter()
            session.run(None, named)
            if count >= 2:  # the first runs allocate
                taken.append((time.perf_counter() - started) * 1e3)
        if count >= 4 and time.perf_counter() > until:
            break
    return [statistics.median(taken) for taken in times]


_loaded: dict[str, tuple[Predict, Describe]] = {}  # by the part of the network; the whole has no name
_first: dict[str, Arrays] = {}  # of what each got


def load(requests: Mapping[str, Mapping[str, Any]]) -> None:
    """Load the files of a network's parts. A request has format, path, and what the loader of that format takes."""
    _loaded.clear()
    _first.clear()
    _loaded.update({part: LOADERS[request["format"]](request) for part, request in requests.items()})


def predict(part: str, inputs: Arrays) -> Arrays:
    """The outputs of a part, from the file that was loaded last."""
    _first.setdefault(part, [x[:1].copy() for x in inputs])
    return _loaded[part][0](inputs)


def describe() -> dict[str, float]:
    """What else is known of the files, once they have predicted: sums over the parts."""
    known: Counter[str] = Counter()
    for part, inputs in _first.items():
        known.update(_loaded[part][1](inputs))
    return dict(known)


def in_words(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function. Raises ``UserError`` for whatever it raises: others may not survive the way to the parent."""
    try:
        return function(*arguments)
    except BaseException as error:  # SystemExit of a user's module would end the parent
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(words) from error


def start(settings: Mapping[str, Any]) -> None:
    """Set this process up: it is silent, ends when its parent does, and computes as its parent does."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the console is the parent's
        os.dup2(silent, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_torch(settings)
    with suppress(Exception):  # whatever is wrong with it is told when a file is loaded
        for module in NEEDED:
            import_module(module)


def _end_with_parent() -> None:
    """A pool's process that waits for work does not notice that its parent was killed."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def torch_settings() -> dict[str, Any]:
    """What this process has set of torch that changes results."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def set_torch(settings: Mapping[str, Any]) -> None:
    """The same in another process."""
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(getattr(torch, settings["dtype"]))
    torch.set_float32_matmul_precision(settings["matmul"])
    torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
