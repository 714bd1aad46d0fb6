"""Networks of which only parts are simulated: what the rest goes on doing, and what cannot be a part."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bnre_exp import (
    LayerRule,
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    list_layers,
    quantize,
    sim_report,
    weight_quantizers,
)
from bnre_exp.quantsim.insert import rebuild_sim
from bnre_exp.quantsim.part_rules import _rests
from bnre_exp.quantsim.whole import parts_of
from tests.detectors import LABELS, PARTS, Backbone, Detector, Head, block, detector, equal, images, tensors
from tests.networks import Net, randomize


def in_parts(model: nn.Module | None = None, submodules=tuple(PARTS), **options) -> Any:
    return quantize(model or detector(), images()[0], submodules=submodules, **options)


def calibrated(model: nn.Module | None = None, **options) -> Any:
    sim = in_parts(model, **options)
    calibrate(sim, images(), num_batches=4)
    return sim


def outside(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if not name.startswith(tuple(f"{p}." for p in PARTS))}


def test_the_rest_is_as_it_was_and_so_is_the_users_model():
    model = detector()
    before = copy.deepcopy(model.state_dict())
    sim = in_parts(model)
    assert type(sim) is Detector and list(parts_of(sim)) == PARTS and not parts_of(model)
    assert {**outside(sim), "backbone": Backbone, "head": Head} == outside(model)
    assert equal(model.state_dict(), before) and not any(m.training for m in model.modules())
    assert sim.normalize is not model.normalize and equal(sim.normalize.state_dict(), model.normalize.state_dict())
    assert not any(module.training for module in sim.modules())


@pytest.mark.parametrize("training", [False, True])
def test_without_quantizers_it_computes_what_the_network_does_in_both_modes(training):
    model = detector().train(training)
    sim = in_parts(model)
    assert sim.training == training
    with bypassed(sim, weights=True):
        for _ in range(2):  # the second time with the statistics of the first
            expected, found = model(images()[0], LABELS), sim(images()[0], LABELS)
            assert type(found) is type(expected) and equal(expected, found)
    if training:
        assert list(found) == ["box", "score"] and float(found["box"].detach()) > 0
        sum(found.values()).backward()
        missing = [name for name, p in sim.named_parameters() if p.grad is None and "act_quantizers" not in name]
        assert all(name.endswith("scale") for name in missing) and len(missing) == len(weight_quantizers(sim))


def test_training_reaches_the_weights_through_the_quantizers():
    sim = calibrated(detector().train())
    sum(sim(images()[0], LABELS).values()).backward()
    without = [name for name, p in sim.named_parameters() if p.grad is None]
    assert not without and len(weight_quantizers(sim)) == 5


class Alone(Head):
    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward([fine, coarse], stride=8.0)


def test_a_part_is_what_it_is_alone():
    model = detector()
    sim = calibrated(model, scheme=QuantScheme(4, 8))
    with torch.no_grad():
        inputs = [model.normalize(x) for x in images()]
        backbone = quantize(model.backbone, inputs[0], QuantScheme(4, 8))
        calibrate(backbone, inputs, num_batches=4)
        weights = {name: q for name, q in weight_quantizers(sim).items() if name.startswith("backbone.")}
        with bypassed(sim):
            maps = [tuple(sim.backbone(x).values()) for x in inputs]  # calibration sees them without quantizers
        head = copy.deepcopy(model.head)
        head.__class__ = Alone
        head = quantize(head, maps[0], QuantScheme(4, 8))
        calibrate(head, maps, num_batches=4, forward_fn=lambda network, batch: network(*batch))
        assert len(weights) == 2 and equal(sim.backbone.network.state_dict(), backbone.state_dict())
        assert equal(sim.head.network.state_dict(), head.state_dict())
        found = sim.backbone(inputs[1])
        assert type(found) is OrderedDict and equal(found, backbone(inputs[1]))
        assert equal(sim.head(list(found.values()), stride=8.0), head(*found.values()))


def test_names_of_reports_and_rows_begin_with_the_part():
    sim = calibrated(detector().train())
    names = {name for name, _ in sim.named_modules()}
    for name in (*activation_quantizers(sim), *weight_quantizers(sim)):
        assert name in names and name.split(".")[:2] in (["backbone", "network"], ["head", "network"])
    rows = list_layers(sim)
    assert [row.name for row in rows[:3]] == ["backbone.x", "backbone.stem.0", "backbone.down.0"]
    assert rows[1].bn == "backbone.stem.1 folded into backbone.stem.0" and rows[1].activation == "backbone.stem.2"
    assert {row.name.split(".")[0] for row in rows} == set(PARTS) and rows[1].range is not None
    assert {text for row in rows for text in row.bn.split(" folded into ") if text} <= set(
        dict(detector().named_modules())
    )
    report = sim_report(sim)
    assert list(report.parts) == PARTS and report.modes_by_part == {"backbone": "same", "head": "same"}
    with pytest.raises(UserError, match="Expected a network that quantize"):
        sim_report(detector())


def test_a_block_bypasses_the_quantizers_of_all_parts():
    sim = calibrated()
    every = [*activation_quantizers(sim).values(), *weight_quantizers(sim).values()]
    with bypassed(sim, weights=True):
        assert all(quantizer.bypassed for quantizer in every)
    assert not any(quantizer.bypassed for quantizer in every) and len(every) > 10


def test_a_state_goes_into_a_rebuilt_simulation_and_a_copy_is_another():
    scheme = QuantScheme(4, 8, overrides=(LayerRule("*.box", weight_bits=8),))
    model, sim = detector(), calibrated(scheme=scheme)
    expected = sim(images()[1])
    again = rebuild_sim(detector(1), images()[0], scheme, modes=sim_report(sim).modes_by_part)
    again.load_state_dict(sim.state_dict())
    copied = copy.deepcopy(sim)
    for other in (again, copied):
        assert equal(other(images()[1]), expected) and sim_report(other) == sim_report(sim)
        with torch.no_grad():
            other.head.network.box.bias.add_(1)
        assert not equal(other(images()[1]), expected) and equal(sim(images()[1]), expected)
    assert not equal(model(images()[1]), expected)


# Modes


def test_what_the_user_froze_stays_so_in_the_parts_and_in_the_rest():
    model = detector().train()
    model.normalize.eval()
    model.backbone.stem[1].eval()
    sim = in_parts(model)
    frozen = ["normalize", "backbone.network.stem.1"]
    assert sim_report(sim).frozen_bns == ("backbone.stem.1",) and not model.normalize.training
    assert [name for name, module in sim.named_modules() if not module.training] == frozen
    assert [name for name, m in sim.train().named_modules() if not m.training] == frozen[1:]  # as with the network


class HeldBackbone(Detector):
    """Its own train keeps batch norms within a part in evaluation mode."""

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for part in (self.backbone, self.normalize):
            for module in part.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def test_a_train_of_the_networks_own_holds_in_parts():
    sim = in_parts(randomize(HeldBackbone()).eval())
    assert sim_report(sim).frozen_bns == ("backbone.stem.1", "backbone.down.1")
    held = [name for name, module in sim.train().named_modules() if not module.training]
    assert held == ["normalize", "backbone.network.stem.1", "backbone.network.down.1"]


def test_a_part_that_cannot_be_trained_is_for_evaluation_alone():
    def forward(head: nn.Module, x: Tensor) -> Tensor:
        return head.conv(x) * 2 if head.training and x.sum() > 0 else head.conv(x)

    head = Net(forward, conv=nn.Conv2d(8, 4, 1))
    model = Net(lambda m, x: m.head(m.backbone(x)["fine"]), backbone=Backbone(), head=head).train()
    sim = in_parts(model, modes="eval")
    assert sim_report(sim).modes_by_part == {"backbone": "same", "head": "eval"} and sim_report(sim).modes == "eval"
    assert sim.backbone.training and not sim.head.training
    with pytest.raises(UserError, match="for evaluation alone"):
        sim.train()


def test_what_else_a_part_is_asked_for_is_in_its_mode_and_in_its_place():
    sim = calibrated(detector().train())
    assert sim.head.training and float(sim.head.losses(*2 * [torch.ones(2, 3, 2)], LABELS[:2])["box"]) == 1
    sim.eval()
    assert float(sim.head.losses(*2 * [torch.ones(2, 3, 2)], LABELS[:2])["box"]) == 0
    sim.double().train()
    losses = sim(images()[0].double(), LABELS)
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sim.head.nothing  # noqa: B018


# Wrappers


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel])
def test_a_wrapped_network_is_taken_out_of_its_wrapper(wrap):
    sim = in_parts(wrap(detector()))
    assert type(sim) is Detector and equal(sim.state_dict(), in_parts().state_dict())


def test_a_part_in_a_wrapper_is_taken_out_of_it():
    model = detector()
    model.head, model.backbone = nn.DataParallel(model.head), nn.DataParallel(model.backbone)
    model.backbone.width, model.head.losses = model.backbone.module.width, model.head.module.losses
    sim, plain = in_parts(model), in_parts()
    assert equal(sim.state_dict(), plain.state_dict()) and sim.state_dict().keys() == plain.state_dict().keys()
    assert sim_report(sim).notes == ("backbone: the network is taken out of DataParallel",)


# Names for the whole


@pytest.mark.parametrize("pattern", ["head.box", "*.box", "*box", "h*.b?x", "[gh]ead.*ox", "*d.b[!a]x", "*ea*.box"])
def test_overrides_go_by_the_names_of_the_whole(pattern):
    sim = in_parts(
        scheme=QuantScheme(8, 8, overrides=(LayerRule("*", weight_bits=6), LayerRule(pattern, weight_bits=4)))
    )
    bits = {row.name: row.weight_bits for row in list_layers(sim) if row.weight_bits}
    expected = dict.fromkeys(("backbone.stem.0", "backbone.down.0", "head.tower.0", "head.score"), 6)
    assert bits == {**expected, "head.box": 4}
    scheme = sim_report(sim).scheme
    assert all(scheme.rule([name]).weight_bits == number for name, number in bits.items())


@pytest.mark.parametrize("pattern", ["box", "head", "head.", "normalize", "head.tower.9", "*.stem", "head.stem.0"])
def test_an_override_that_is_in_no_part_is_refused(pattern):
    with pytest.raises(UserError, match=r"matches nothing in the parts backbone, head.*as list_layers\(\) shows"):
        in_parts(scheme=QuantScheme(8, 8, overrides=(LayerRule(pattern, weight_bits=4),)))


@pytest.mark.parametrize("prefix", ["b.", "a-]", "ab.ab."])
def test_what_is_left_of_a_pattern_matches_what_is_left_of_a_name(prefix):
    letters, names = ["a", "b", ".", "*", "?", "[ab]", "[!a]", "["], ["a", "b", "a.b", "ab", "b.", "]"]
    found = set()
    for length in range(1, 6):
        for pattern in map("".join, itertools.product(letters, repeat=length)):
            if length > 3 and hash(pattern) % 40:
                continue
            rests = _rests(pattern, prefix)
            for name in names:
                matches = fnmatchcase(prefix + name, pattern)
                assert any(fnmatchcase(name, rest) for rest in rests) == matches, (pattern, name, rests)
                found.add(matches)
    assert found == {True, False}


def test_bits_of_a_first_layer_that_is_not_known_are_refused():
    with pytest.raises(UserError, match="first_last_bits: .*name the layers in overrides"):
        in_parts(scheme=QuantScheme(4, 8, first_last_bits=8))


@pytest.mark.parametrize(("leaf", "whole"), [("backbone.stem", "backbone.stem"), ("Tower", "head.tower")])
def test_leaf_modules_go_by_the_names_of_the_whole(leaf, whole):
    model = detector()
    model.stem = nn.Identity()
    model.head.tower.__class__ = type("Tower", (nn.Sequential,), {})
    sim = in_parts(model, leaf_modules=[leaf])
    layers = [row.name for row in list_layers(sim) if row.kind == "Conv2d"]
    assert not any(name.startswith(whole) for name in layers) and len(layers) >= 5
    kept = "kept whole; its 1 conv or linear weights stay float"
    assert sim_report(sim).unquantized == ((whole, kept),)


@pytest.mark.parametrize("leaf", ["stem", "backbone", "Detector", "head.stem", "nothing"])
def test_a_leaf_that_is_within_no_part_is_refused(leaf):
    model = detector()
    model.stem = nn.Identity()
    with pytest.raises(UserError, match=f"leaf_modules: no module or class within backbone, head is named {leaf}"):
        in_parts(model, leaf_modules=[leaf])


# What cannot be a part


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bakbone"], "the network has no 'bakbone'; at its top it has normalize, backbone, head"),
        ([""], "the network has no ''; at its top"),
        (["head", "head.tower"], "head.tower is a part of head; give parts that have nothing in common"),
        (["head", "backbone", "head"], "a name is given twice"),
        (["spare"], "spare is not called by the network in evaluation mode"),
        (["backbone.stem.1.weight"], "the network has no 'backbone.stem.1.weight'"),
    ],
)
def test_names_that_are_no_parts_are_refused(names, message):
    model = detector()
    if "spare" in names:
        model.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(UserError, match=f"submodules: {message}"):
        in_parts(model, names)


def test_a_network_that_fails_is_refused_and_a_simulation_is_no_network_to_simulate():
    with pytest.raises(
        UserError, match="The network fails on the example in evaluation mode: running_mean should contain 2"
    ):
        quantize(detector(), images()[0][:, :2], submodules=PARTS)
    with pytest.raises(UserError, match="submodules: head: The network is in half precision .stem.*model.float"):
        quantize(Net(lambda m, x: m.head(x), head=Backbone().half()), images()[0], submodules=["head"])
    for parts in (PARTS, ["normalize"]):
        with pytest.raises(UserError, match="quantize: "):
            in_parts(in_parts(), parts)
    lazy = Net(lambda m, x: m.head(x), head=nn.Sequential(nn.LazyConv2d(4, 1)))
    with pytest.raises(UserError, match=r"submodules: head: 0\.weight has no shape yet"):
        in_parts(lazy, ["head"])


def alias(model):
    model.again = model.head


def share_batch_norm(model):
    model.normalize = block(3, 3)
    model.normalize[1] = nn.BatchNorm2d(3)
    model.outer = model.backbone.stem[1]


def tie_weights(model):
    model.backbone.down[0].weight = model.head.tower[0].weight


def tie_statistics(model):
    model.head.tower[1].running_mean = model.backbone.stem[1].running_mean


def tie_to_the_network(model):
    model.register_parameter("prior", model.head.score.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (alias, "head is also the network's again; a part has one place"),
        (share_batch_norm, "backbone.stem.1.weight and outer.weight are the same tensor, in backbone and in the rest"),
        (tie_weights, "backbone.down.0.weight and head.tower.0.weight are the same tensor, in backbone and in head"),
        (tie_statistics, "backbone.stem.1.running_mean and head.tower.1.running_mean are the same tensor"),
        (tie_to_the_network, "prior and head.score.bias are the same tensor, in the rest of the network and in head"),
    ],
)
def test_what_a_part_shares_with_another_or_with_the_rest_is_refused(change, message):
    model = detector()
    change(model)
    with pytest.raises(UserError, match=f"submodules: {message}"):
        in_parts(model)


def test_weights_that_are_tied_within_a_part_stay_tied():
    model = detector()
    model.backbone.down[0] = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    model.backbone.extra = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    model.backbone.extra.weight = model.backbone.down[0].weight
    model.backbone.down.append(model.backbone.extra)
    sim = in_parts(model)
    layers = [
        sim.backbone.network.get_submodule(name).parametrizations.weight.original for name in ("down.0", "down.3")
    ]
    assert layers[0] is layers[1]


def test_a_module_of_a_part_that_the_rest_holds_in_a_list_is_not_called_unsimulated():
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model.head(model.held[0](x))

    model = Net(forward, stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 4, 1))
    model.held = [model.stem]
    sim = in_parts(model, ["stem"])
    with pytest.raises(UserError, match="A module of a part that is simulated is called by the rest"):
        sim(images()[0])


class Calls(nn.Module):
    """Calls its head in a way that the test chooses."""

    def __init__(self, call: Any, head: nn.Module) -> None:
        super().__init__()
        self.call, self.head = call, head

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.call(self.head, x, *more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head, x: head([x], stride=float(x.mean())), "expected 0.5.*as on the example, got 2.0"),
        (
            lambda head, x: head([x] * round(float(x.mean()) * 2), stride=1.0),
            r"expected \(\[tensor\], stride=1.0\), got",
        ),
        (lambda head, x: head([x], stride=1.0 if x.mean() < 1 else x.mean()), "expected 1.0.*, got a tensor"),
        (lambda head, x: head([x if x.mean() < 1 else None], stride=1.0), "expected a tensor, got None"),
        (lambda head, x: head(maps=[x], stride=1.0) if x.mean() < 1 else head([x], stride=1.0), r"maps=\[tensor\]"),
    ],
)
def test_a_part_that_is_called_otherwise_later_is_refused(call, message):
    example = torch.full((2, 8, 4, 4), 0.5)
    sim = quantize(Calls(call, randomize(Head())).eval(), example, submodules=["head"])
    with bypassed(sim):
        sim(example)
        with pytest.raises(UserError, match=f"called with other arguments than those that it was.*{message}"):
            sim(example * 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head, x: [head([x], stride=s) for s in (1.0, 2.0)], "in several ways: expected 1.0, .*got 2.0"),
        (lambda head, x: [head([x] * n, stride=1.0) for n in (1, 2)], r"several ways: expected \(\[tensor\], stride"),
        (lambda head, x: head([x], stride=x.numpy()), "is called with a ndarray; expected tensors"),
        (lambda head, x: head([], stride=1.0), "is called without tensors"),
    ],
)
def test_calls_that_no_graph_can_stand_for_are_refused(call, message):
    class Free(Head):
        def forward(self, maps: Any, *, stride: Any) -> Any:
            return super().forward(maps, stride=float(torch.as_tensor(stride).sum())) if maps else maps

    with pytest.raises(UserError, match=f"submodules: head .*{message}"):
        quantize(Calls(call, Free()).eval(), torch.ones(2, 8, 4, 4), submodules=["head"])


def over_levels(head: nn.Module, x: Tensor, *_: Any) -> list[Tensor]:
    return [head(x), head(nn.functional.avg_pool2d(x, 2))]


def test_a_head_over_maps_of_several_sizes_is_right_for_each():
    model = Calls(over_levels, randomize(block(3, 8))).eval()
    sim = in_parts(model, ["head"])
    with torch.no_grad(), bypassed(sim, weights=True):
        assert equal(sim(images()[1]), model(images()[1]))


def test_a_head_whose_graph_is_right_for_the_first_map_alone_is_refused():
    def forward(head: nn.Module, x: Tensor) -> Tensor:
        return head.conv(x) if x.shape[-1] > 8 else head.conv(x).relu()

    model = Calls(over_levels, Net(forward, conv=nn.Conv2d(3, 8, 1))).eval()
    message = "submodules: head: The traced network fails in evaluation .*another course than with the example"
    with pytest.raises(UserError, match=message):
        in_parts(model, ["head"])


@pytest.mark.parametrize(("change", "reads_again"), [("relu_", True), ("relu_", False), ("sigmoid_", True)])
def test_what_a_part_changes_in_place_is_not_read_unchanged(change, reads_again):
    def call(head: nn.Module, x: Tensor) -> Any:
        x = x * 2
        y = head(x)
        return (y, x) if reads_again else y

    model = Calls(call, Net(lambda m, x: m.conv(getattr(x, change)()), conv=nn.Conv2d(3, 8, 1))).eval()
    if reads_again:
        with pytest.raises(
            UserError, match="submodules: head changes what it is given in place, and the network reads"
        ):
            in_parts(model, ["head"])
    else:
        sim = in_parts(model, ["head"])
        with torch.no_grad(), bypassed(sim, weights=True):
            assert equal(sim(images()[1]), model(images()[1]))


def test_an_example_is_left_alone_and_may_come_from_inference_mode():
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model.head(x.mul_(2).add_(1))

    model = Net(forward, head=nn.Sequential(nn.Conv2d(3, 8, 1))).eval()
    with torch.inference_mode():
        example = images()[0].clone()
        sim = in_parts(model, ["head"])
    quantize(model, example, submodules=["head"])
    assert torch.equal(example, images()[0])
    with bypassed(sim):
        sim(images()[1]).sum().backward()
    assert all(p.grad is not None for p in sim.head.parameters() if p.ndim > 1)


@pytest.mark.parametrize("given", ["tuple", "dict", "tensor"])
def test_the_example_is_whatever_the_network_takes(given):
    x = images()[0]
    example = {"tuple": (x, LABELS), "dict": {"labels": LABELS, "images": x}, "tensor": x}[given]
    assert equal(quantize(detector(), example, submodules=PARTS).state_dict(), in_parts().state_dict())


# A detector of torchvision


@pytest.fixture(scope="module")
def ssdlite():
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "trainable_backbone_layers": None}
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(**options)
    model.transform.fixed_size = (64, 64)
    return model.eval()


def test_torchvisions_ssdlite_goes_on_detecting_and_computing_its_losses(ssdlite):
    pictures = [torch.rand(3, 60, 64), torch.rand(3, 64, 50)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([n])} for n in (1, 2)]
    sim = quantize(ssdlite, (pictures,), submodules=PARTS)
    with torch.no_grad(), bypassed(sim, weights=True):
        expected, found = ssdlite(pictures), sim(pictures)
        assert len(tensors(found)) == 6 and equal(found, expected)
        expected, found = (
            copy.deepcopy(ssdlite).train()(pictures, targets),
            copy.deepcopy(sim).train()(pictures, targets),
        )
        assert list(found) == ["bbox_regression", "classification"] and equal(found, expected)
