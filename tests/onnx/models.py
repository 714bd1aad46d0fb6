"""ONNX models with batch norm, as different exporters write them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from bnre_exp.onnx_io.session import feeds, open_session


def dynamo(model: nn.Module, x: Tensor, **options) -> onnx.ModelProto:
    """torch.export's exporter, batch norms left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), (x,), dynamo=True, optimize=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), **options,
        )  # fmt: skip
    return program.model_proto


def torchscript(model: nn.Module, x: Tensor, opset: int = 13, **options) -> onnx.ModelProto:
    """torch's older exporter; in the mode "preserve" it leaves batch norms as they are."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (x,), buffer, dynamo=False, opset_version=opset, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE, input_names=["x"], dynamic_axes={"x": {0: "batch"}}, **options,
        )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


def built(nodes, tensors, shape, opset: int = 18, outputs=("y",), inputs=("x",)) -> onnx.ModelProto:
    """A model written by hand; tensors: values by name."""
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(name, 1, shape) for name in inputs],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model) if opset <= 21 else model


def bn(x: str, y: str, prefix: str = "bn", **attributes) -> onnx.NodeProto:
    names = [x, *(f"{prefix}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
    return helper.make_node("BatchNormalization", names, [y], name=f"node_{y}", **attributes)


def bn_tensors(channels: int, prefix: str = "bn", seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    gamma = random.normal(size=channels)
    gamma[0] = 0
    values = {"weight": gamma, "bias": random.normal(size=channels), "running_mean": random.normal(size=channels)}
    values["running_var"] = random.uniform(0.2, 3, size=channels)
    return {f"{prefix}.{name}": value.astype(np.float32) for name, value in values.items()}


def values_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto, x) -> list[np.ndarray]:
    session = open_session(model)
    return session.run(None, feeds(session, x))
