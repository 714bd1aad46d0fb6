"""Quantized ONNX models whose scales are in float16."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from bnre_exp.onnx import fold_batch_norms
from tests.onnx.models import bn, bn_tensors, built, values_of


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_scale_that_float16_does_not_hold_is_not_folded_into(size):
    """A gamma of 1e-4 would make scales of 1e-6, of which float16 keeps four bits."""
    parameters = {name: value.astype(np.float16) for name, value in bn_tensors(4).items()}
    parameters["bn.weight"] = np.array([0.0, size, -1.0, 1.0], np.float16)
    codes = np.random.default_rng(0).integers(-7, 8, (4, 3, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["v"], axis=0),
        helper.make_node("Conv", ["x", "v"], ["c"]),
        bn("c", "y"),
    ]
    model = built(nodes, {"w": codes, "ws": np.full(4, 0.01, np.float16), **parameters}, ["N", 3, 6, 6], opset=19)
    del model.graph.value_info[:]
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.elem_type = TensorProto.FLOAT16
    folded, report = fold_batch_norms(model)
    if size == 1.0:
        assert report.kept == () and values_of(folded)["y_scale"].dtype == np.float16
        assert set(np.unique(values_of(folded)["y_codes"][0])) == {0}
    else:
        ((_, reason),) = report.kept
        assert "too small for float16" in reason
