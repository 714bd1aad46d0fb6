"""ONNX files as torch networks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from bnre_exp.data.preprocess import stored_preprocessing
from bnre_exp.errors import UserError
from bnre_exp.models.zoo import BuiltModel
from bnre_exp.onnx_io.files import load_model
from bnre_exp.onnx_io.opset import lower
from bnre_exp.onnx_io.session import feeds, open_session, run_session

CONVERTED_OPSET = 15  # the converter knows few operations in newer forms
ASSUMED_SIZE = 64  # of an axis that the model leaves open [pixels]
LARGEST_ERROR = 1e-4  # relative to the largest output


def build_onnx(path: str) -> BuiltModel:
    """The network of an ONNX file with floating-point weights, converted by onnx2torch and compared with ONNX Runtime's
    outputs at two batch sizes.

    Raises ``UserError`` if there is no such file, it is quantized already, its batch size is fixed, the converter does
    not know an operation, or outputs differ.
    """
    model = load_model(path)
    _check(model, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = _converted(model)
    except UserError as error:
        raise UserError(f"model.path={path} cannot be converted to torch: {error}.") from error
    except Exception as error:  # the converter raises whatever it meets
        raise UserError(
            f"model.path={path} cannot be converted to torch by onnx2torch: {type(error).__name__}: {error}. Give the "
            "network as a torch module (model=custom) instead."
        ) from error
    _compare(model, network, path)
    preprocessing = stored_preprocessing({item.key: item.value for item in model.metadata_props})
    return BuiltModel(network, preprocessing, pretrained=True)


def _check(model: onnx.ModelProto, path: str) -> None:
    quantized = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul"}
    if any(node.op_type in quantized for node in model.graph.node):
        raise UserError(
            f"model.path={path} is quantized already; give the floating-point model. To re-estimate or fold the batch "
            "norms of a quantized one: python -m bnre_exp.onnx."
        )
    inputs = _inputs(model)
    if len(inputs) != 1:
        raise UserError(f"model.path={path} has {len(inputs)} inputs; expected one, the images [N, C, H, W].")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise UserError(f"model.path={path}: its input is {name}; expected FLOAT, preprocessed images.")
    dims = kind.shape.dim
    if len(dims) < 2:
        raise UserError(f"model.path={path}: its input has no declared shape; expected [N, C, H, W] with a dynamic N.")
    if dims[0].dim_value:
        raise UserError(
            f"model.path={path}: its batch size is fixed to {dims[0].dim_value}; export it with a dynamic batch "
            "(torch.onnx.export: dynamic_shapes)."
        )


def _inputs(model: onnx.ModelProto) -> list[Any]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [item for item in model.graph.input if item.name not in weights]


def _converted(model: onnx.ModelProto) -> fx.GraphModule:
    import onnx2torch
    import onnx_ir as ir
    from onnxscript import optimizer

    simple = ir.from_proto(model)
    if "ai.onnx" in simple.opset_imports:  # another way to write the same
        simple.opset_imports[""] = simple.opset_imports.pop("ai.onnx")
    optimizer.fold_constants(simple, onnx_shape_inference=True)
    _fix_shapes(simple.graph)
    lower(simple, CONVERTED_OPSET)
    network = onnx2torch.convert(onnx.shape_inference.infer_shapes(ir.to_proto(simple), data_prop=True))
    _plain_reshapes(network)
    return network.eval()  # type: ignore[no-any-return]


def _fix_shapes(graph: Any) -> None:
    """Where only the batch of a new shape is computed: ONNX's 0, "as it is". A wrong guess fails the comparison."""
    import onnx_ir as ir

    for node in graph:
        shape = node.inputs[1].producer() if node.op_type == "Reshape" and node.domain == "" else None
        if shape is None or shape.op_type != "Concat":
            continue
        known = [ir.convenience.get_const_tensor(part) for part in shape.inputs]
        if known[0] is not None or any(part is None for part in known[1:]):
            continue
        sizes = np.concatenate([[0], *(np.ravel(part.numpy()) for part in known[1:] if part is not None)])
        value = ir.Value(name=f"{node.outputs[0].name}_shape", const_value=ir.tensor(sizes.astype(np.int64)))
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)


def _plain_reshapes(network: fx.GraphModule) -> None:
    """The converter's reshaping decides by values of tensors, which torch.fx cannot follow; here they are constants."""
    for node in list(network.graph.nodes):
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if type(module).__name__ != "OnnxReshape" or node.args[1].op != "get_attr":
            continue
        owner, _, name = node.args[1].target.rpartition(".")
        shape = getattr(network.get_submodule(owner), name).tolist()
        x = node.args[0]
        with network.graph.inserting_before(node):
            sizes = [network.graph.call_method("size", (x, i)) if n == 0 else n for i, n in enumerate(shape)]
            reshaped = network.graph.call_method("reshape", (x, *sizes))
        node.replace_all_uses_with(reshaped)
        network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()


@torch.no_grad()
def _compare(model: onnx.ModelProto, network: nn.Module, path: str) -> None:
    session = open_session(model)
    dims = _inputs(model)[0].type.tensor_type.shape.dim
    shape = [dim.dim_value or (3 if i == 0 else ASSUMED_SIZE) for i, dim in enumerate(list(dims)[1:])]
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3):
        x = torch.randn(size, *shape, generator=generator)
        try:
            expected = torch.from_numpy(run_session(session, feeds(session, x))[0]).double()
        except UserError as error:
            raise UserError(f"model.path={path}: {error}") from error
        try:
            output = network(x)
        except Exception as error:  # whatever the converted network meets
            raise UserError(
                f"model.path={path}: converted to torch it cannot run on {list(x.shape)} ({type(error).__name__}: "
                f"{error}). Give the network as a torch module (model=custom) instead."
            ) from error
        output = output[0] if isinstance(output, (tuple, list)) else output
        error_size = float((output.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not error_size <= LARGEST_ERROR:
            raise UserError(
                f"model.path={path}: converted to torch, its outputs differ from ONNX Runtime's by {error_size:.1e} of "
                "the largest. Give the network as a torch module (model=custom) instead."
            )
