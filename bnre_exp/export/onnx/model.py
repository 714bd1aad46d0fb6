"""A folded network as an ONNX model with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnre_exp.algorithms.bias import quantize_biases
from bnre_exp.algorithms.fold import fold_batch_norms
from bnre_exp.errors import UserError, first_line
from bnre_exp.export.onnx.known import is_known_to_export
from bnre_exp.export.onnx.plain import plain_network
from bnre_exp.export.onnx.qdq import insert_qdq
from bnre_exp.export.onnx.records import Plain
from bnre_exp.files import write_file
from bnre_exp.quantsim.parts import inputs_of_parts
from bnre_exp.quantsim.sim import activation_quantizers, bypassed
from bnre_exp.quantsim.whole import parts_of


def export_onnx(
    folded: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = 21,
    int4: bool = True,
) -> None:
    """Write a folded network as an ONNX file that integer runtimes take as it is; the network is unchanged.

    Weights are integer initializers (int4 up to 4 bits from opset 21 on unless ``int4`` is False, else int8 or int16),
    with a scale per channel; biases int32; activations uint8 (uint16 above 8 bits), their codes clipped to the bits
    they have. The batch size is dynamic.

    example_input: one batch ``[N, ...]`` with N >= 2, or a tuple of inputs. opset: 13 to 23; what needs integers of 9
    to 16 bits needs 21. Of a network that was simulated in parts, ``path`` is a folder, with a file a part (head.onnx),
    whose inputs have the sizes that the example gives them; the example is as ``quantize`` takes it.

    Raises ``UserError`` if the network is not folded, or holds an operation, bits or scales that ONNX or the opset
    cannot express, and if the file cannot be written.
    """
    target = Path(path)
    if parts := parts_of(folded):
        for name, inputs in inputs_of_parts(folded, example_input).items():
            export_onnx(parts[name], inputs, target / f"{name}.onnx", opset=opset, int4=int4)
        return
    try:
        write_qdq(plain_network(folded, example_input, opset), target, int4)
    except UserError as error:
        raise UserError(f"{target} cannot be exported: {error}.") from error


def check_exportable(sim: Any, example_input: Any, opset: int) -> None:
    """Raise ``UserError`` if a simulation, once it is calibrated and folded, cannot be written at ``opset``.

    sim: as :func:`bnre_exp.quantize` returns it; it is unchanged. Where its operations alone do not tell, this finds
    out by folding and exporting a copy.
    """
    if parts := parts_of(sim):
        with bypassed(sim):  # it has no ranges yet
            calls = inputs_of_parts(sim, example_input)
        for name, inputs in calls.items():
            check_exportable(parts[name], inputs, opset)
        return
    if not is_known_to_export(sim, example_input, opset):
        try_export(sim, example_input, opset)


def try_export(sim: Any, example_input: Tensor | Sequence[Tensor], opset: int) -> None:
    """Fold and export a copy of a simulation. Raises ``UserError`` where that does not go."""
    from bnre_exp.onnx_io.session import open_session

    trial = copy.deepcopy(sim)
    for quantizer in activation_quantizers(trial).values():
        quantizer.set_range(0.0 if quantizer.unsigned else -1.0, 1.0)
    folded, _ = fold_batch_norms(trial)
    quantize_biases(folded)
    open_session(checked(insert_qdq(plain_network(folded, example_input, opset), int4=True)))


def write_qdq(plain: Plain, path: Path, int4: bool) -> None:
    """Write ``plain`` with its quantizers in it; ``plain`` is used up."""
    write_model(insert_qdq(plain, int4), path)


def write_model(model: Any, path: Path) -> None:
    """Check an ``onnx_ir.Model`` and write it, whole or not at all. Raises ``UserError`` if the disk refuses."""
    write_file(path, checked(model).SerializeToString())


def checked(model: Any) -> Any:
    """An ``onnx_ir.Model`` as ``onnx.ModelProto``. Raises ``UserError`` if it is not valid, or too large for a file."""
    import onnx
    import onnx_ir as ir

    from bnre_exp.onnx_io.files import LARGEST

    model.producer_name = "bnre_exp"
    proto = ir.to_proto(model)
    if proto.ByteSize() > LARGEST:
        raise UserError("the network is larger than the 2 GB that one ONNX file holds")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker's and shape inference's own kinds
        raise UserError(f"its ONNX model is not valid ({first_line(error)}); this is a defect of bnre_exp") from error
    return proto
