"""A process that loads an exported file anew and predicts what comes in, on standard input and output.

Requests are lines of JSON on standard input, answers are on standard output. ``{"load": {"format": …, "path": …, …}}``
loads a file; ``{"predict": {"shape": …, "dtype": …}}``, with the bytes of the array after it, is answered by such a
line and array of logits; ``{"describe": true}`` asks for what else is known.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch

TIMED_RUNS, TIMED_SECONDS = 50, 2.0
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QLinearConvTranspose")
LAYERS = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")

Predict = Callable[[np.ndarray], np.ndarray]
Describe = Callable[[np.ndarray], dict[str, float]]


def load_checkpoint(request: Mapping[str, Any]) -> tuple[Predict, Describe]:
    """A folded checkpoint, in torch, computed on integers. request: path, device; model: how to build what the
    checkpoint does not hold."""
    from bnre_exp.algorithms.integers import integer_simulation
    from bnre_exp.export.checkpoint.save_load import load_folded
    from bnre_exp.models.build import build_model
    from bnre_exp.tasks.task import first_tensor

    model = build_model(**request["model"]).module.eval() if request.get("model") else None
    network = integer_simulation(load_folded(request["path"], model).to(request["device"])).eval()

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            output: Any = first_tensor(network(torch.from_numpy(x).to(request["device"])))
            return output.float().cpu().numpy()

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
    from bnre_exp.onnx_io.session import feeds, open_session

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = open_session(model, optimized_to=optimized)
        kinds = Counter(node.op_type for node in load_model(optimized).graph.node)
    integer, floating = (sum(kinds[kind] for kind in those) for those in (INTEGER_KERNELS, LAYERS))

    def predict(x: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(None, feeds(session, x))[0]
        return logits

    def describe(x: np.ndarray) -> dict[str, float]:
        known = {"integer_layers": float(integer), "float_layers": float(floating)}
        if float_path is not None:
            times = _interleaved([session, open_session(load_model(float_path))], x)
            known.update(zip(("milliseconds", "fp32_milliseconds"), times))
        return known

    return predict, describe


def _interleaved(sessions: list[Any], x: np.ndarray) -> list[float]:
    """The median time of one run of each session on ``x`` [ms]; they take turns, since other work disturbs both."""
    from bnre_exp.onnx_io.session import feeds

    inputs = [feeds(session, x) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    until = time.perf_counter() + TIMED_SECONDS
    for count in range(TIMED_RUNS + 2):
        for session, given, taken in zip(sessions, inputs, times):
            started = time.perf_counter()
            session.run(None, given)
            if count >= 2:  # the first runs allocate
                taken.append((time.perf_counter() - started) * 1e3)
        if count >= 4 and time.perf_counter() > until:
            break
    return [statistics.median(taken) for taken in times]


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    predict: Predict | None = None
    describe: Describe | None = None
    first: np.ndarray | None = None
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        if "load" in request:
            predict, describe = LOADERS[request["load"]["format"]](request["load"])
            _say(answers, {"loaded": request["load"]["path"]})
        elif "predict" in request and predict is not None:
            x = read_array(request["predict"], requests)
            first = x[:1].copy() if first is None else first
            logits = np.ascontiguousarray(predict(x))
            _say(answers, describe_array(logits))
            answers.write(logits.tobytes())
        elif "describe" in request and describe is not None and first is not None:
            _say(answers, describe(first))
        answers.flush()


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


def describe_array(x: np.ndarray) -> dict[str, Any]:
    """What :func:`read_array` must know."""
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def read_array(known: Mapping[str, Any], stream: IO[bytes]) -> np.ndarray:
    """An array from its bytes. Raises ``EOFError`` if the stream ends before."""
    dtype = np.dtype(known["dtype"])
    size = math.prod(known["shape"]) * dtype.itemsize
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the stream ended within an array")
    return np.frombuffer(bytearray(content), dtype).reshape(known["shape"])


def _say(answers: BinaryIO, what: Mapping[str, Any]) -> None:
    answers.write(json.dumps(what).encode() + b"\n")


def main() -> None:
    """Serve on the process's own standard input and output; whatever prints meanwhile goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    set_torch(json.loads(sys.argv[1]))
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
