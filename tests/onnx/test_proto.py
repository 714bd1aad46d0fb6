"""ONNX models read into objects and written again: what must survive that, and weights of a layer's own."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from bnre_exp import UserError
from bnre_exp.onnx import fold_batch_norms, reestimate_bn_stats
from bnre_exp.onnx.compare import compare_outputs
from bnre_exp.onnx_io.proto import from_proto, to_proto
from bnre_exp.onnx_io.session import unshared
from tests.onnx.models import bn, bn_tensors, built

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def product_and_bn() -> onnx.ModelProto:
    """x → MatMul → BN → Add a sparse initializer → y; no node has a name."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        bn("h", "b"),
        helper.make_node("Add", ["b", "sparse"], ["y"]),
    ]
    model = built(nodes, {"w": np.arange(12, dtype=np.float32).reshape(3, 4), **bn_tensors(4)}, ["N", 3])
    values, indices = helper.make_tensor("sparse", 1, [1], [2.0]), helper.make_tensor("indices", 7, [1], [1])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    model.graph.node[1].ClearField("name")
    return model


def test_sparse_initializers_and_nodes_without_a_name_stay_so():
    model = product_and_bn()
    again = to_proto(from_proto(model), model)
    assert again.graph.sparse_initializer == model.graph.sparse_initializer
    assert again.graph.node == model.graph.node
    folded, report = fold_batch_norms(model)
    assert report.folded == (("h", "bn"),) and compare_outputs(model, folded, [X]) < 1e-5
    before = copy.deepcopy(model)
    with reestimate_bn_stats(model, [X], 1) as handle:
        assert handle.reestimated == ("bn",) and model != before
    assert model == before


def test_the_older_name_of_onnx_s_own_domain():
    model = product_and_bn()
    model.opset_import[0].domain = "ai.onnx"
    assert from_proto(model).opset_imports == {"": 18}
    assert len(fold_batch_norms(model)[1].folded) == 1


@pytest.mark.parametrize("function", [fold_batch_norms, lambda model: reestimate_bn_stats(model, [X], 1)])
def test_a_damaged_model_is_one_clear_error(function):
    model = product_and_bn()
    model.graph.node[0].output[0] = "b"
    with pytest.raises(UserError, match="The ONNX model is not valid"):
        function(model)


def test_every_layer_gets_weights_of_its_own():
    tensors = {"w": np.eye(3, dtype=np.int8), "s": np.float32(0.5), "v": np.eye(3, dtype=np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["e"]),
        helper.make_node("MatMul", ["x", "d"], ["a"]),
        helper.make_node("MatMul", ["a", "d"], ["b"]),
        helper.make_node("MatMul", ["b", "e"], ["y"]),
    ]
    model = built(nodes, tensors, ["N", 3])
    copied = unshared(model)
    onnx.checker.check_model(copied)
    read = [name for node in copied.graph.node for name in node.input if name not in ("s", "x")]
    assert len(read) == len(set(read)) == 8
    assert compare_outputs(model, copied, [X]) == 0
