"""ONNX files: read with one clear error, written whole or not at all."""

from __future__ import annotations

import copy
import os
import uuid
from contextlib import suppress
from pathlib import Path

import onnx

from bnre_exp.errors import UserError, first_line
from bnre_exp.files import replacing
from bnre_exp.onnx_io.bounds import check_bounds

LARGEST = 2**31 - 2**20  # protobuf holds no more in one piece; weights then go to a file beside the model


def load_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file, with the weights that are in files beside it.

    Raises ``UserError`` if it is not there, is no ONNX file, or asks for more than a network needs (see
    :func:`~bnre_exp.onnx_io.bounds.check_bounds`).
    """
    target = Path(path)
    if not target.is_file():
        what = "it is not a regular file" if target.exists() else "there is no such file"
        raise UserError(f"{target}: {what}; expected an ONNX model.")
    try:
        model = onnx.load(target)
    except Exception as error:  # protobuf, onnx and the file system each have their own
        raise UserError(f"{target} is not an ONNX model, or a damaged one ({first_line(error)}).") from error
    if not model.graph.node or not model.opset_import:
        raise UserError(f"{target} is not an ONNX model: it has no operations.")
    try:
        check_bounds(model)
    except UserError as error:
        raise UserError(f"{target} cannot be used: {error}.") from error
    return model


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model; weights above two gigabytes go to a file ``<name>.….data`` beside it.

    Raises ``UserError`` if the disk refuses.
    """
    target = Path(os.path.realpath(path))
    data = f"{target.name}.{uuid.uuid4().hex[:8]}.data"
    try:
        with replacing(target) as new:
            if model.ByteSize() < LARGEST:
                onnx.save(model, new)
            else:
                onnx.save(copy.deepcopy(model), new, save_as_external_data=True, location=data)
    except OSError as error:
        with suppress(OSError):  # a disk that is full would stay full
            target.with_name(data).unlink(missing_ok=True)
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
