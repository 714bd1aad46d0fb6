"""A folded network as a plain ONNX model and AIMET encodings, for Qualcomm's tools."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx

from bnre_exp.errors import UserError
from bnre_exp.export.onnx.model import write_model
from bnre_exp.export.onnx.plain import EXPORTER_OPSET, plain_network
from bnre_exp.export.onnx.records import Codes, Grid, Plain, along
from bnre_exp.files import write_file

VERSIONS = ("1.0.0", "2.0.0")
MODEL = "model.onnx"


def export_encodings(
    folded: fx.GraphModule,
    example_input: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    versions: Sequence[str] = VERSIONS,
    opset: int = EXPORTER_OPSET,
) -> None:
    """Write the folder ``path``: ``model.onnx``, which computes in float32, and a file of encodings a version, with the
    grid of every quantized tensor by its name in that model; the network is unchanged.

    example_input: one batch ``[N, ...]`` with N >= 2, or a tuple of inputs. versions: of AIMET's format, "1.0.0" and
    "2.0.0"; the files are called ``encodings_1.0.0.json`` and so on.

    Raises ``UserError`` if the network is not folded, holds what ONNX cannot express, a version is unknown, or the
    files cannot be written.
    """
    folder = Path(path)
    try:
        write_encodings(plain_network(folded, example_input, opset), folder, versions)
    except UserError as error:
        raise UserError(f"{folder} cannot be exported: {error}.") from error


def write_encodings(plain: Plain, folder: Path, versions: Sequence[str] = VERSIONS) -> None:
    """Write the model and the encodings of ``plain``, which is unchanged."""
    versions = (versions,) if isinstance(versions, str) else versions
    unknown = [version for version in versions if version not in VERSIONS]
    if unknown:
        raise UserError(f"version {unknown[0]!r} of encodings: expected {' or '.join(VERSIONS)}")
    write_model(plain.model, folder / MODEL)
    for version in versions:
        text = json.dumps(_DOCUMENTS[version](plain), indent=1)
        write_file(folder / encodings_name(version), text.encode())


def encodings_name(version: str) -> str:
    """The name of a file of encodings."""
    return f"encodings_{version}.json"


def _document_1(plain: Plain) -> dict[str, Any]:
    return {
        "version": "1.0.0",
        "producer": "bnre_exp",
        "activation_encodings": [_activation_1(grid) for grid in plain.grids],
        "param_encodings": [_parameter_1(codes) for codes in plain.parameters],
        "quantizer_args": {},
    }


def _activation_1(grid: Grid) -> dict[str, Any]:
    numbers = {"scale": [grid.scale], "offset": [float(-grid.zero_point)]}
    return {"name": grid.name, "dtype": "INT", "bw": grid.bits, "is_sym": False, **numbers, "enc_type": "PER_TENSOR"}


def _parameter_1(codes: Codes) -> dict[str, Any]:
    # The offset of this version counts from the lowest code, also where codes are signed.
    scale = [float(x) for x in codes.scale.ravel()]
    numbers = {"scale": scale, "offset": [-float(2 ** (codes.bits - 1))] * len(scale)}
    kind = "PER_TENSOR" if codes.axis is None else "PER_CHANNEL"
    return {"name": codes.name, "dtype": "INT", "bw": codes.bits, "is_sym": True, **numbers, "enc_type": kind}


def _document_2(plain: Plain) -> dict[str, Any]:
    return {
        "version": "2.0.0",
        "producer": "bnre_exp",
        "encodings": [_activation_2(grid) for grid in plain.grids] + [_parameter_2(c) for c in plain.parameters],
    }


def _activation_2(grid: Grid) -> dict[str, Any]:
    zero = {"y_zero_point": grid.zero_point} if grid.zero_point else {}
    return {"name": grid.name, "output_dtype": f"uint{grid.bits}", "y_scale": grid.scale, **zero}


def _parameter_2(codes: Codes) -> dict[str, Any]:
    kind = f"int{codes.bits}"
    if codes.axis is None:
        return {"name": codes.name, "output_dtype": kind, "y_scale": float(codes.scale.ravel()[0])}
    scale = [float(x) for x in codes.scale]
    return {"name": codes.name, "output_dtype": kind, "y_scale": scale, "axis": codes.axis}


_DOCUMENTS = {"1.0.0": _document_1, "2.0.0": _document_2}


def read_encodings(folder: Path, version: str) -> Plain:
    """The model of a folder that :func:`export_encodings` wrote, with grids and codes as one file of encodings says.

    Raises ``UserError`` if an entry names no tensor of the model, or the weights are not on the grid it describes.
    """
    import onnx
    import onnx_ir as ir

    model = ir.from_proto(onnx.load(folder / MODEL))
    document = json.loads((folder / encodings_name(version)).read_text())
    if version == "1.0.0":
        entries = [_from_1(entry) for entry in document["activation_encodings"] + document["param_encodings"]]
    else:
        entries = [_from_2(entry) for entry in document["encodings"]]
    known = {value.name for node in model.graph for value in node.outputs} | {x.name for x in model.graph.inputs}
    grids, parameters = [], []
    for name, bits, is_signed, scale, zero_point, is_per_channel, axis in entries:
        if name in model.graph.initializers:
            value = model.graph.initializers[name]
            axis = _channel_axis(value) if is_per_channel and axis is None else axis
            parameters.append(_codes(value, bits, scale, axis))
        elif name in known and not is_signed:
            grids.append(Grid(name, float(scale[0]), zero_point, bits))
        else:
            raise UserError(f"{folder / encodings_name(version)} names {name!r}, which is no tensor of {MODEL}")
    return Plain(model, tuple(grids), tuple(parameters))


# name, bits, is signed, scale, zero point, is per channel, axis (which version 1.0.0 does not say)
_Entry = tuple[str, int, bool, np.ndarray, int, bool, int | None]


def _from_1(entry: dict[str, Any]) -> _Entry:
    scale, zero_point, is_per_channel = (
        np.array(entry["scale"]),
        -int(entry["offset"][0]),
        entry["enc_type"] == "PER_CHANNEL",
    )
    return entry["name"], entry["bw"], entry["is_sym"], scale, zero_point, is_per_channel, None


def _from_2(entry: dict[str, Any]) -> _Entry:
    kind = entry["output_dtype"]
    scale = np.atleast_1d(np.array(entry["y_scale"]))
    bits, axis = int(kind.removeprefix("u").removeprefix("int")), entry.get("axis")
    return entry["name"], bits, not kind.startswith("u"), scale, entry.get("y_zero_point", 0), axis is not None, axis


def _channel_axis(value: Any) -> int:
    """Where the output channels of a parameter are, by the operation that reads it."""
    node = value.uses()[0].node
    if len(value.shape) == 1:
        return 0  # a bias
    is_transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
    is_grouped = "group" in node.attributes and node.attributes["group"].as_int() > 1  # then of one channel each
    first = node.op_type == "Conv" or (node.op_type == "Gemm" and is_transposed)
    return 0 if first or (node.op_type == "ConvTranspose" and is_grouped) else 1


def _codes(value: Any, bits: int, scale: np.ndarray, axis: int | None) -> Codes:
    weight = value.const_value.numpy()
    codes = np.rint(weight.astype(np.float64) / along(scale, weight.ndim, axis))
    largest = 2 ** (bits - 1)
    if np.abs(codes).max(initial=0) > largest:
        raise UserError(f"{value.name} exceeds the grid of {bits} bits that its encoding describes")
    kind = np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32
    return Codes(value.name, value.name, codes.astype(kind), scale.astype(np.float32), axis, bits)
