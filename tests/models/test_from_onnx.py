"""ONNX files as networks of the pipeline."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, UserError, calibrate, fold_batch_norms, quantize, sim_report
from bnre_exp.models.build import build_model
from tests.networks import Net, flat_cnn, randomize
from tests.onnx.models import built, dynamo, torchscript
from tests.torchvision_networks import network, small_or_slow

TARGET = "bnre_exp.models.onnx_model"


def converted(model: onnx.ModelProto, path) -> nn.Module:
    onnx.save(model, path)
    return build_model(TARGET, path=str(path), num_classes=10).module


@pytest.mark.parametrize("name", small_or_slow("small resnet", "small mobilenet_v3", "resnet18", "mobilenet_v3_small"))
@pytest.mark.parametrize("exporter", [dynamo, torchscript])
def test_torchvision_network_through_quantization(exporter, name, tmp_path):
    model = network(name).eval()
    x = torch.randn(4, 3, 64, 64)
    again = converted(exporter(model, x), tmp_path / "net.onnx")
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    bns = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in again.modules()) == bns
    sim = quantize(again, x, QuantScheme(weight_bits=4))
    calibrate(sim, [x], 1)
    _, report = fold_batch_norms(sim)
    assert len(report.folded) == bns and not report.kept and not sim_report(sim).unquantized
    y = again.train()(x)
    assert y.requires_grad and y.shape == (4, 10)


def refused(model: onnx.ModelProto, path, message: str) -> None:
    onnx.save(model, path)
    with pytest.raises(UserError, match=message) as caught:
        build_model(TARGET, path=str(path), num_classes=10)
    assert str(path) in str(caught.value)


def test_refused(tmp_path):
    path = tmp_path / "net.onnx"
    good = dynamo(randomize(flat_cnn()), torch.randn(4, 3, 16, 16))
    fixed = copy.deepcopy(good)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    refused(fixed, path, "batch size is fixed to 4")
    make = onnx.helper.make_node
    tensors = {"s": np.float32(0.1), "z": np.uint8(0)}
    refused(
        built([make("QuantizeLinear", ["x", "s", "z"], ["y"])], tensors, ["N", 3], outputs=()),
        path,
        "quantized already",
    )
    refused(built([make("Add", ["a", "b"], ["y"])], {}, ["N", 3], inputs=("a", "b")), path, "has 2 inputs")
    refused(built([make("Det", ["x"], ["y"])], {}, ["N", 3, 3]), path, "onnx2torch: NotImplementedError.*Det")
    with pytest.raises(UserError, match="there is no such file"):
        build_model(TARGET, path=str(tmp_path / "nowhere.onnx"), num_classes=10)
    with pytest.raises(UserError, match=r"model.path is not set"):
        build_model(TARGET, num_classes=10)
    with pytest.raises(UserError, match=r"model.path=a.onnx means nothing to torch.nn.Flatten"):
        build_model("torch.nn.Flatten", path="a.onnx", num_classes=10)
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(UserError, match="is not an ONNX model"):
        build_model(TARGET, path=str(tmp_path / "text.onnx"), num_classes=10)


def test_a_conversion_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    import onnx2torch

    def wrong(model):
        network = real(model)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.1
        return network

    real = onnx2torch.convert
    monkeypatch.setattr(onnx2torch, "convert", wrong)
    refused(
        dynamo(randomize(flat_cnn()), torch.randn(4, 3, 16, 16)), tmp_path / "net.onnx", "differ from ONNX Runtime's"
    )


def test_a_reshape_of_the_batch_is_followed(tmp_path):
    model = Net(
        lambda self, x: self.head(self.conv(x).view(x.shape[0], -1)), conv=nn.Conv2d(3, 4, 3), head=nn.Linear(144, 10)
    )
    x = torch.randn(4, 3, 8, 8)
    network = converted(dynamo(model, x), tmp_path / "net.onnx")
    with torch.no_grad():
        torch.testing.assert_close(network(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-5)
