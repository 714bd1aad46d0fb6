"""AIMET encodings and the plain ONNX model they are for: read by AIMET itself, and by ourselves."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from bnre_exp import UserError, bypassed, export_encodings, export_onnx
from bnre_exp.export.encodings import VERSIONS, read_encodings
from bnre_exp.export.onnx.qdq import insert_qdq
from tests.export.onnx.test_model import IMAGES, outputs, session
from tests.export.saving import folded_network
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network, small_or_slow


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=4, act_bits=6)
    export_encodings(folded, IMAGES, folder / "encodings")
    export_onnx(folded, IMAGES, folder / "net.onnx")
    return folded, folder


def document(folder, version):
    return json.loads((folder / "encodings" / f"encodings_{version}.json").read_text())


def test_plain_model_computes_in_floating_point(small):
    folded, folder = small
    with torch.no_grad(), bypassed(folded):
        wanted = folded(IMAGES).numpy()
    np.testing.assert_allclose(outputs(folder / "encodings/model.onnx", IMAGES)[0], wanted, rtol=1e-4, atol=1e-5)
    kinds = {node.op_type for node in onnx.load(folder / "encodings/model.onnx").graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear", "Clip"}


def test_every_quantized_tensor_has_an_entry_by_its_name(small):
    folded, folder = small
    model = onnx.load(folder / "encodings/model.onnx")
    tensors = {name for node in model.graph.node for name in node.output} | {item.name for item in model.graph.input}
    weights = {tensor.name for tensor in model.graph.initializer}
    first, second = document(folder, "1.0.0"), document(folder, "2.0.0")
    assert {entry["name"] for entry in first["activation_encodings"]} <= tensors
    parameters = {f"{layer}.{part}" for layer in ("0", "3", "6", "11") for part in ("weight", "bias")}
    assert {entry["name"] for entry in first["param_encodings"]} == parameters <= weights
    names = [entry["name"] for entry in first["activation_encodings"] + first["param_encodings"]]
    assert names == [entry["name"] for entry in second["encodings"]] and len(names) == len(set(names))
    layer = folded.get_submodule("0")
    (entry,) = (entry for entry in first["param_encodings"] if entry["name"] == "0.weight")
    np.testing.assert_allclose(entry["scale"], layer.parametrizations.weight[0].scale)
    assert entry["offset"] == [-8.0] * 8 and entry["bw"] == 4 and entry["is_sym"] and entry["enc_type"] == "PER_CHANNEL"
    (entry,) = (entry for entry in second["encodings"] if entry["name"] == "0.weight")
    assert entry["output_dtype"] == "int4" and entry["axis"] == 0 and "y_zero_point" not in entry
    (entry,) = (entry for entry in second["encodings"] if entry["name"] == "0.bias")
    assert entry["output_dtype"] == "int32"
    assert {entry["output_dtype"] for entry in second["encodings"][: len(first["activation_encodings"])]} == {"uint6"}


@pytest.mark.parametrize("version", VERSIONS)
def test_our_reader_gives_the_same_quantized_model(version, small, tmp_path):
    _, folder = small
    model = insert_qdq(read_encodings(folder / "encodings", version), int4=True)
    onnx.save(ir.to_proto(model), tmp_path / "again.onnx")
    np.testing.assert_array_equal(outputs(tmp_path / "again.onnx", IMAGES)[0], outputs(folder / "net.onnx", IMAGES)[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_channel_axes_survive(version, tmp_path):
    def forward(self, x):
        y = self.transposed(x)
        return self.linear(y.flatten(2).transpose(1, 2)).mean(1)

    model = Net(forward, transposed=nn.ConvTranspose2d(3, 4, 3), linear=nn.Linear(4, 5))
    folded = folded_network(randomize(model), IMAGES, weight_bits=4)
    export_encodings(folded, IMAGES, tmp_path)
    axes = {codes.name: codes.axis for codes in read_encodings(tmp_path, version).parameters}
    assert axes["transposed.weight"] == 1 and axes["linear.weight"] == 1 and axes["linear.bias"] == 0


@pytest.mark.parametrize("name", small_or_slow("small mobilenet_v3", "small resnet", "mobilenet_v3_small", "resnet18"))
def test_aimet_simulates_the_same_network(name, tmp_path):
    quantsim = pytest.importorskip("aimet_onnx.quantsim", reason="aimet-onnx has wheels for Linux on x86 only")
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    torch.manual_seed(1)
    model = network(name).train()
    with torch.no_grad():
        model(images)
    bits = {"weight_bits": 3, "act_bits": 6} if "resnet" in name else {"weight_bits": 4, "act_bits": 8}
    folded = folded_network(model.eval(), images, **bits)
    export_encodings(folded, images, tmp_path)
    with torch.no_grad():
        wanted = folded(images)
    for version in VERSIONS:
        sim = quantsim.QuantizationSimModel(onnx.load(tmp_path / "model.onnx"))
        unmatched = quantsim.load_encodings_to_sim(sim, str(tmp_path / f"encodings_{version}.json"), strict=False)
        added = {item.quantizer_name for item in unmatched if item.enabled_mismatch and item.enabled_mismatch[1]}
        print(version, added)
        # What AIMET does not quantize unless told to.
        assert all(item.endswith((".bias", "_on_grid")) for item in added)
        got = torch.from_numpy(sim.session.run(None, {"x": images.numpy()})[0])
        assert (got.argmax(1) == wanted.argmax(1)).double().mean() >= 31 / 32
        assert torch.isclose(got, wanted, rtol=1e-4, atol=1e-5).double().mean() > 0.9


@pytest.mark.parametrize("version", VERSIONS)
def test_aimet_takes_the_lowest_code_of_the_full_grid(version, tmp_path):
    quantsim = pytest.importorskip("aimet_onnx.quantsim", reason="aimet-onnx has wheels for Linux on x86 only")
    folded = folded_network(randomize(flat_cnn()), IMAGES, weight_bits=2, act_bits=8, weight_grid="full")
    assert int(folded.get_submodule("0").parametrizations.weight.original.min()) == -2
    export_encodings(folded, IMAGES, tmp_path, versions=[version])
    sim = quantsim.QuantizationSimModel(onnx.load(tmp_path / "model.onnx"))
    quantsim.load_encodings_to_sim(sim, str(tmp_path / f"encodings_{version}.json"), strict=False)
    got = torch.from_numpy(sim.session.run(None, {"input": IMAGES.numpy()})[0])
    with torch.no_grad():
        wanted = folded(IMAGES)
    assert torch.isclose(got, wanted, rtol=1e-4, atol=1e-5).double().mean() > 0.9


def test_refused(small, tmp_path):
    folded, folder = small
    with pytest.raises(UserError, match=r"version '0.6.1' of encodings: expected 1.0.0 or 2.0.0"):
        export_encodings(folded, IMAGES, tmp_path / "old", versions=["0.6.1"])
    path = tmp_path / "changed"
    export_encodings(folded, IMAGES, path)
    file = path / "encodings_2.0.0.json"
    file.write_text(file.read_text().replace('"0.weight"', '"nowhere"'))
    with pytest.raises(UserError, match="names 'nowhere', which is no tensor"):
        read_encodings(path, "2.0.0")
    assert session(path / "model.onnx", True) is not None
