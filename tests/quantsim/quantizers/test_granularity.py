"""Whether scales are per channel is a fact that quantizers carry: one channel is not one tensor."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bnre_exp import (
    QuantScheme,
    bypassed,
    calibrate,
    fold_batch_norms,
    integer_simulation,
    list_layers,
    load_folded,
    quantize,
    quantize_biases,
    save_folded,
    weight_quantizers,
)
from bnre_exp.export.encodings import VERSIONS, read_encodings, write_encodings
from bnre_exp.export.onnx.model import checked
from bnre_exp.export.onnx.plain import _along_axis, plain_network
from bnre_exp.export.onnx.qdq import insert_qdq
from bnre_exp.onnx_io.session import open_session
from bnre_exp.quantsim.insert import rebuild_sim
from bnre_exp.report.layers import layers_columns
from tests.networks import Net, randomize

X = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(3))


def spatial_attention() -> nn.Module:
    """A conv with one output channel that gates the others, as in CBAM."""

    def forward(m, x):
        x = m.stem(x)
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return m.head((x * torch.sigmoid(m.bn(m.conv(pooled)))).mean((2, 3)))

    stem = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    conv, bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)
    return Net(forward, stem=stem, conv=conv, bn=bn, head=nn.Linear(8, 4))


def one_logit() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(400, 1), nn.BatchNorm1d(1))


def heat_map() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 1, 3, bias=False), nn.BatchNorm2d(1))


def groups() -> nn.Module:
    """One output channel a group, in a conv of two inputs a group, and in transposed ones of one and of two."""
    first = nn.Conv2d(4, 2, 3, groups=2, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)
    second = nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(*first, *second, nn.ConvTranspose2d(4, 2, 3, groups=2), nn.BatchNorm2d(2))


def trained(model: nn.Module, bits: int, per_channel: bool = True, steps: int = 6) -> nn.Module:
    """A simulation whose scales have moved, in float64."""
    scheme = QuantScheme(weight_bits=bits, act_bits=8, per_channel=per_channel)
    sim = quantize(model.double().train(), X.double(), scheme)
    calibrate(sim, [X.double()], 1)
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.05, momentum=0.9)
    target = torch.randn(sim(X.double()).shape, generator=torch.Generator().manual_seed(4)).double()
    for _ in range(steps):
        optimizer.zero_grad()
        (sim(X.double()) - target).square().mean().backward()
        optimizer.step()
    return sim.eval()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("build", [spatial_attention, one_logit, heat_map, groups])
@torch.no_grad()
def test_one_channel_is_folded_exactly_after_training(build, bits):
    with torch.enable_grad():
        sim = trained(build(), bits)
    folded, report = fold_batch_norms(sim)
    assert report.lossy == () and report.folded and report.kept == ()
    with bypassed(sim), bypassed(folded):
        expected, actual = sim(X.double()), folded(X.double())
    assert float((actual - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


def test_one_scale_for_a_tensor_of_one_channel_stays_so():
    sim = trained(spatial_attention(), 4, per_channel=False)
    assert not weight_quantizers(sim)["conv"].per_channel
    folded, report = fold_batch_norms(sim)
    assert dict(report.lossy)["conv"] == "weights quantized anew (one scale for the whole tensor)"
    quantize_biases(folded)
    weight, bias = folded.get_submodule("conv").parametrizations.values()
    assert not weight[0].per_channel and _along_axis("conv", weight[0])[0] is None
    assert bias[0].per_channel and _along_axis("conv", bias[0])[0] == 0
    rows = layers_columns(list_layers(sim))
    assert dict(zip(rows["layer"], rows["weight"]))["conv"] == "4 bits, per tensor"


@pytest.fixture(scope="module")
def shipped():
    """A folded network in float32 with one-channel layers, its biases on the grid."""
    torch.manual_seed(0)
    folded, _ = fold_batch_norms(trained(spatial_attention(), 4).float())
    quantize_biases(folded)
    return folded


def test_one_channel_is_per_channel_in_every_file(shipped, tmp_path):
    plain = plain_network(shipped, X)
    axes = {codes.name: codes.axis for codes in plain.parameters}
    assert axes["conv.weight"] == 0 and axes["conv.bias"] == 0
    write_encodings(plain, tmp_path / "encodings")
    for version in VERSIONS:
        parameters = read_encodings(tmp_path / "encodings", version).parameters
        assert {codes.name: codes.axis for codes in parameters} == axes
    save_folded(shipped, tmp_path / "net")
    loaded = load_folded(tmp_path / "net")
    assert loaded.get_submodule("conv").parametrizations.weight[0].per_channel
    assert torch.equal(loaded(X), shipped(X))


def test_checkpoints_of_before_say_nothing_of_granularity_and_load(shipped, tmp_path):
    save_folded(shipped, tmp_path / "net")
    document = json.loads((tmp_path / "net" / "network.json").read_text())
    document["version"] = 2
    for module in document["modules"].values():
        for spec in module["codes"].values():
            del spec["per_channel"], spec["dtype"]
    (tmp_path / "net" / "network.json").write_text(json.dumps(document))
    loaded = load_folded(tmp_path / "net")
    assert torch.equal(loaded(X), shipped(X))
    assert loaded.get_submodule("stem.0").parametrizations.weight[0].per_channel


def test_one_channel_in_integers(shipped):
    names = dict(integer_simulation(shipped).named_modules())
    assert names["conv_in_integers"].multiplier.shape == (1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(integer_simulation(shipped)(X), shipped(X), rtol=0, atol=2e-2)


def test_a_rebuilt_simulation_and_the_table_of_layers_know_it():
    model = spatial_attention()
    sim = quantize(model, X, QuantScheme(weight_bits=4))
    again = rebuild_sim(model, X, QuantScheme(weight_bits=4))
    for each in (sim, again):
        assert all(quantizer.per_channel for quantizer in weight_quantizers(each).values())
        rows = layers_columns(list_layers(each))
        assert dict(zip(rows["layer"], rows["weight"]))["conv"] == "4 bits, 1 channel"


@torch.no_grad()
def test_a_group_of_one_output_channel_has_an_axis_in_onnx(tmp_path):
    """All inputs of a group share the scale of its only output, so that axis 0 holds them."""
    model = randomize(groups()).eval()
    sim = quantize(model, X, QuantScheme(weight_bits=4, act_bits=None))
    folded, _ = fold_batch_norms(sim)
    plain = plain_network(folded, X)
    parameters = {codes.name: codes for codes in plain.parameters}
    one, two = parameters["3.weight"], parameters["5.weight"]
    assert (one.axis, one.scale.shape, two.axis, two.scale.shape) == (0, (4,), 0, (4,))
    scale = folded.get_submodule("5").parametrizations.weight[0].scale
    assert torch.equal(torch.from_numpy(two.scale), scale.repeat_interleave(2))
    write_encodings(plain, tmp_path / "encodings")
    for version in VERSIONS:
        again = {codes.name: codes for codes in read_encodings(tmp_path / "encodings", version).parameters}
        assert again["5.weight"].axis == 0 and (again["5.weight"].codes == two.codes).all()
    session = open_session(checked(insert_qdq(plain, int4=True)))
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), folded(X), rtol=1e-4, atol=1e-4)
