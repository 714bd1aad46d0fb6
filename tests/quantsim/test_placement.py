"""Where quantizers go is decided without touching the graph, and the simulation has just what was decided."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnre_exp import QuantScheme, activation_quantizers, quantize, sim_report, weight_quantizers
from bnre_exp.quantsim.groups import find_groups
from bnre_exp.quantsim.node_facts import record
from bnre_exp.quantsim.placement import Placement, WeightPlacement, place_quantizers
from bnre_exp.quantsim.quantizers.scheme import LayerRule
from bnre_exp.quantsim.tracing.trace import trace

IMAGES = (torch.randn(4, 3, 8, 8),)


class Small(nn.Module):
    """A group, a layer, a sum, a weight that a function reads, and two modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.weight = nn.Parameter(torch.randn(4, 8, 1, 1))
        self.unused, self.unused_bn = nn.Linear(2, 2), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        return F.conv2d(y + self.second(y), self.weight)


def traced(model: nn.Module) -> fx.GraphModule:
    graph, _ = trace(model, IMAGES, ())
    record(graph, IMAGES)
    return graph


def place(model: nn.Module, graph: fx.GraphModule, scheme: QuantScheme) -> Placement:
    return place_quantizers(model, graph, find_groups(graph), scheme)


def test_placement_says_what_is_quantized_how_and_what_is_not_and_why() -> None:
    model = Small()
    rules = (LayerRule("second", off=True), LayerRule("add", act_bits=6))
    placement = place(model, traced(model), QuantScheme(4, 5, first_last_bits=8, overrides=rules))
    assert [(a.label, a.bits, a.unsigned) for a in placement.activations] == [
        ("x", 8, False), ("conv", 8, True), ("add", 6, False), ("conv2d", 5, False)
    ]  # fmt: skip
    assert placement.weights == (WeightPlacement("conv", 8),)
    assert placement.unquantized == (
        ("second", "switched off by the override 'second'"),
        ("weight", "a constant or parameter that the graph reads directly"),
        ("unused", "never reached by the forward pass; dropped"),
    )
    assert placement.unreached_bns == ("unused_bn",)


def test_deciding_changes_nothing_and_the_simulation_has_what_was_decided() -> None:
    model, scheme = Small(), QuantScheme(4, 8)
    graph = traced(model)
    nodes, metas = [repr(node) for node in graph.graph.nodes], [dict(node.meta) for node in graph.graph.nodes]
    code, before = graph.code, copy.deepcopy(graph.state_dict())
    placement = place(model, graph, scheme)
    assert [repr(node) for node in graph.graph.nodes] == nodes and graph.code == code
    assert [dict(node.meta) for node in graph.graph.nodes] == metas
    after = graph.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    sim = quantize(model, IMAGES, scheme)
    names = [f"act_quantizers.{a.node.name}" for a in placement.activations]
    quantizers = activation_quantizers(sim)
    assert list(quantizers) == names
    assert [(q.label, q.bits, q.unsigned) for q in quantizers.values()] == [
        (a.label, a.bits, a.unsigned) for a in placement.activations
    ]
    assert {name: q.bits for name, q in weight_quantizers(sim).items()} == {w.name: w.bits for w in placement.weights}
    assert sim_report(sim).unquantized == placement.unquantized
