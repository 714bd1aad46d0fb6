"""Running ONNX models with ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from bnre_exp.errors import UserError, first_line
from bnre_exp.files import work_folder
from bnre_exp.onnx_io.files import LARGEST
from bnre_exp.onnx_io.names import names_of, unique
from bnre_exp.onnx_io.proto import Value, from_proto, to_proto

# Options of a session. Without VNNI, AVX2's fast product of uint8 and int8 saturates; so it is taken only where exact.
EXACT = {"session.x64quantprecision": "1"}
LONGEST = 600  # a batch may take [s]; a loop without an end takes any time
KINDS = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}  # fmt: skip


def open_session(
    model: onnx.ModelProto, providers: Sequence[str] | None = None, optimized_to: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime, with as many threads as torch has. providers: None: the CPU; optimized_to: where to
    write the graph that really runs.

    Raises ``UserError`` if the runtime does not take the model.
    """
    chosen = list(providers or ["CPUExecutionProvider"])
    try:
        return _open(model, chosen, optimized_to)
    except Exception as error:  # the runtime has a class for each of its status codes
        with suppress(Exception):
            return _open(unshared(model), chosen, optimized_to)
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} does not take the model: {first_line(error)}"
        ) from error


def unshared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every layer has 8-bit weights of its own: ONNX Runtime 1.32 cannot prepare shared ones for
    :data:`EXACT` products."""
    copied = from_proto(model)
    graph, taken = copied.graph, names_of(copied.graph)
    weights: list[Value] = [x for x in graph.initializers.values() if x.dtype == ir.DataType.INT8 and x.shape]
    read = [node for weight in weights for node in weight.consumers() if node.op_type == "DequantizeLinear"]
    for node in read:
        output = node.outputs[0]
        for use in list(output.uses())[1:]:
            again = ir.node(node.op_type, node.inputs, node.attributes)
            again.outputs[0].name = unique(str(output.name), taken)
            node.graph.insert_after(node, again)
            use.node.replace_input_with(use.idx, again.outputs[0])
    for weight in weights:
        for use in list(weight.uses())[1:]:
            tensor = ir.tensor(weight.const_value.numpy(), name=unique(str(weight.name), taken))
            graph.register_initializer(same := ir.val(tensor.name, const_value=tensor))
            use.node.replace_input_with(use.idx, same)
    return to_proto(copied, model)


def _open(model: onnx.ModelProto, providers: list[str], optimized_to: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    options.log_severity_level = 4  # what goes wrong is told once, by the exception
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    if model.ByteSize() < LARGEST:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with work_folder() as folder:
        path = folder / "model.onnx"
        onnx.save(copy.deepcopy(model), path, save_as_external_data=True, location="model.data")
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def feeds(session: onnxruntime.InferenceSession, batch: Any) -> dict[str, np.ndarray]:
    """Inputs of a session from a batch: an array or tensor, a tuple or list whose first element is one, or a mapping
    from input names to arrays.

    Raises ``UserError`` if names, types or shapes do not fit what the model declares.
    """
    declared = {item.name: item for item in session.get_inputs()}
    if isinstance(batch, Mapping):
        given = dict(batch)
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if len(declared) > 1:
            raise UserError(
                f"The model has {len(declared)} inputs ({', '.join(declared)}); give batches as a mapping of names to "
                "arrays."
            )
        given = {next(iter(declared)): first}
    if given.keys() != declared.keys():
        raise UserError(f"The batch has the inputs {', '.join(given)}; the model has {', '.join(declared)}.")
    return {name: _fitting(value, declared[name]) for name, value in given.items()}


def run_session(session: onnxruntime.InferenceSession, given: dict[str, np.ndarray]) -> list[Any]:
    """All outputs. Raises ``UserError`` if the runtime fails on these inputs, or takes longer than :data:`LONGEST`."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    stop = Timer(LONGEST, setattr, (options, "terminate", True))  # which it heeds between two operations
    stop.daemon = True
    stop.start()
    try:
        return list(session.run(None, given, options))
    except Exception as error:  # the runtime has a class for each of its status codes
        shapes = ", ".join(str(list(value.shape)) for value in given.values())
        why = f"it did not end within {LONGEST} s" if options.terminate else first_line(error)
        raise UserError(f"ONNX Runtime cannot run the model on {shapes}: {why}") from error
    finally:
        stop.cancel()


def _fitting(value: Any, declared: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise UserError(
            f"A batch is of type {type(value).__name__}; expected an array or tensor, a tuple whose first element is "
            "one, or a mapping of input names to arrays."
        )
    kind, shape = KINDS.get(declared.type), declared.shape
    if kind is not None and not np.can_cast(value.dtype, kind, "same_kind"):
        raise UserError(f"The input {declared.name} of the model is {declared.type}; the data are {value.dtype}.")
    if kind in (np.float16, np.float32, np.float64) and value.dtype.kind in "iub":
        raise UserError(
            f"The input {declared.name} of the model is {declared.type}; the data are integers ({value.dtype}). Give "
            "them preprocessed, as the model takes them."
        )
    # A shape that is not declared reads as that of a scalar.
    if shape and (len(shape) != value.ndim) or any(type(n) is int and n != m for n, m in zip(shape, value.shape)):
        wanted = f"[{', '.join(map(str, shape))}]"
        hint = ""
        if len(shape) == value.ndim and type(shape[0]) is int and shape[0] != value.shape[0]:
            hint = f" Its batch size is fixed: give batches of {shape[0]}, or export it with a dynamic batch."
        raise UserError(
            f"The input {declared.name} of the model has the shape {wanted}; the data are {list(value.shape)}.{hint}"
        )
    return np.ascontiguousarray(value, dtype=kind)
