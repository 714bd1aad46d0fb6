"""The layer-by-layer table: every operation once, in order, with what became of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnre_exp import (
    LayerRule,
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    list_layers,
    quantize,
    weight_quantizers,
)
from bnre_exp.report.layers import layers_columns, layers_markdown
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network, small_or_slow

X = torch.randn(4, 3, 16, 16)


def test_rows_of_a_small_network():
    scheme = QuantScheme(
        weight_bits=4, act_bits=8, overrides=(LayerRule("11", off=True), LayerRule("3", weight_bits=6))
    )
    sim = quantize(randomize(flat_cnn()).eval(), X, scheme)
    assert all(row.range is None for row in list_layers(sim))
    calibrate(sim, [X], 1)
    rows = {row.name: row for row in list_layers(sim)}
    assert list(rows) == ["input_1", "0", "3", "6", "9", "10", "11"]
    first = rows["0"]
    assert (first.kind, first.weight_bits, first.weight_scales, first.activation) == ("Conv2d", 4, 8, "2")
    assert (first.bn, first.act_bits, first.unsigned, first.note) == ("1 folded into 0", 8, True, "")
    assert first.range[0] == 0 and first.range[1] == pytest.approx(
        255 * float(activation_quantizers(sim)["act_quantizers._2"].scale.detach()), rel=1e-6
    )
    assert rows["3"].weight_bits == 6 and rows["9"].weight_bits is None and rows["9"].act_bits == 8
    assert rows["10"].act_bits is None and rows["10"].note == "moves or selects values"
    assert rows["11"].weight_bits is None and "switched off" in rows["11"].note
    low, high = rows["input_1"].range
    assert low < 0 < high and not rows["input_1"].unsigned


def test_kept_bn_is_a_row_with_its_reason():
    layers = {"bn": nn.BatchNorm2d(3), "conv": nn.Conv2d(3, 3, 1)}
    rows = {row.name: row for row in list_layers(quantize(Net(lambda m, x: m.conv(m.bn(x)), **layers), X))}
    assert rows["bn"].bn.startswith("kept: no conv or linear layer directly before it") and rows["bn"].act_bits == 8
    assert rows["conv"].bn == ""


@pytest.mark.parametrize(
    "name",
    small_or_slow("small mobilenet_v3", "small densenet", "mobilenet_v3_small", "googlenet", "densenet121"),
)
def test_real_networks_are_listed_completely(name):
    model = network(name).eval()
    x = torch.randn(2, 3, 64, 64)
    sim = quantize(model, x, QuantScheme(weight_bits=4, act_bits=8))
    rows = list_layers(sim)
    assert len({row.name for row in rows}) == len(rows)
    assert sum(row.weight_bits == 4 for row in rows) == len(weight_quantizers(sim))
    assert sum(row.act_bits is not None for row in rows) == len(activation_quantizers(sim))
    report = fold_batch_norms(sim)[1]
    assert {row.bn for row in rows if "folded" in row.bn} == {
        f"{bn} folded into {layer}" for layer, bn in report.folded
    }
    assert sum(row.bn.startswith("kept") for row in rows) == sum("never reached" not in r for _, r in report.kept)
    executed = []
    for layer in weight_quantizers(sim):
        sim.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: executed.append(layer))
    with torch.no_grad(), bypassed(sim):
        sim(x)
    assert [row.name for row in rows if row.weight_bits] == executed


def test_an_addition_before_a_relu_says_where_it_is_quantized():
    rows = {row.name: row for row in list_layers(quantize(network("small resnet"), X))}
    assert rows["add"].act_bits is None and rows["add"].note == "quantized after layers.4.relu"
    assert all(row.act_bits or row.note for row in rows.values())


def test_tables_have_a_cell_for_every_row():
    rows = list_layers(quantize(flat_cnn(), X, QuantScheme(per_channel=False)))
    columns = layers_columns(rows)
    assert {len(cells) for cells in columns.values()} == {len(rows)}
    assert columns["weight"][1] == "8 bits, per tensor" and columns["output"][0] == "8 bits, with zero point"
    page = layers_markdown("a run", columns)
    assert page.count("\n") == len(rows) + 4 and "| 0 | Conv2d | 8 bits, per tensor | 1 folded into 0 | 2 |" in page


def test_only_simulations_are_listed():
    with pytest.raises(UserError, match="quantize"):
        list_layers(flat_cnn())
    with pytest.raises(UserError, match="folded"):
        list_layers(fold_batch_norms(quantize(flat_cnn(), X))[0])
