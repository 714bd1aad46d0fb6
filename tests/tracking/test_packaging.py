"""The ONNX model as MLflow serves it."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from bnre_exp import export_onnx, integer_simulation
from bnre_exp.tracking.packaging import package_onnx
from tests.export.saving import folded_network
from tests.networks import Net


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_served_model_computes_what_was_simulated(is_shared, tmp_path):
    """Also where the CPU's fast products of uint8 and int8 saturate, and for weights that two layers share."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: torch.cat([m.one(x), (m.one if is_shared else m.two)(x.flip(3))], 1).flatten(1),
        one=nn.Conv2d(3, 6, 3), two=nn.Conv2d(3, 6, 3),
    )  # fmt: skip
    images = torch.rand(64, 3, 16, 16)
    folded = folded_network(net, images, weight_bits=8)
    export_onnx(folded, images, tmp_path / "net.onnx")
    package_onnx(tmp_path / "net.onnx", tmp_path / "model", images[:1].numpy())
    with torch.no_grad():
        wanted = integer_simulation(folded)(images).numpy()
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images.numpy())
    np.testing.assert_array_equal(next(iter(found.values())), wanted)
