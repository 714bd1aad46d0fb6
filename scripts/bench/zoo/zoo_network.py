"""One network of a zoo, from the float network to its folded checkpoint, checked on the way. See zoo.py."""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).parent))
import packages  # noqa: E402
from foldable import foldable_bns  # noqa: E402

from bnre_exp import (  # noqa: E402
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    load_folded,
    quantize,
    reestimate_bn_stats,
    save_folded,
    sim_report,
    weight_quantizers,
)

BNS = (_BatchNorm, FrozenBatchNorm2d)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
SPREAD = 0.25  # of gammas and betas: larger ones make deep random networks chaotic
LAYER_LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}
SCHEME = QuantScheme(weight_bits=4, act_bits=8)


class Wrong(Exception):
    """The network went through, but something that must hold does not."""


class IllConditioned(Exception):
    """Random weights made signals overflow, or rounding errors grow as large as the signals."""


def check(source: str, name: str) -> dict[str, Any]:
    """Quantize, calibrate, re-estimate, fold, save and load one network; a row of results for the table.

    source: torchvision, timm or one of packages.py. Raises ``Wrong`` where a result is not what it must be, and what
    the library raises. Where random gammas make signals overflow or the network chaotic (a zero gamma in a chain of
    depthwise layers, a division by a sum of activations), all gammas are positive and the images larger instead, and
    the row says so.
    """
    try:
        return check_with(source, name, gammas="any sign, zero")
    except IllConditioned:
        return check_with(source, name, gammas="positive")


def check_with(source: str, name: str, gammas: str) -> dict[str, Any]:
    """:func:`check` with one choice of random gammas."""
    torch.manual_seed(0)
    model, sizes = build(source, name)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    row["bns"] = sum(isinstance(module, BNS) for module in model.modules())
    if not row["bns"]:
        return row
    inputs = first_that_fits(model, sizes if gammas != "positive" else [*sizes[-2:-1], *sizes])
    row["gammas"] = gammas
    row["input"] = "×".join(map(str, inputs[0].shape[1:]))
    randomize(model, inputs, gammas)
    sim = quantize(model, inputs[0], SCHEME)
    report = sim_report(sim)
    row["activations"] = len(activation_quantizers(sim))
    row |= check_weights(model, sim)
    with telling_of_overflow():
        calibrate(sim, inputs, 2)
        row["modes"] = report.modes
        if report.modes != "eval":
            check_training(model, sim, inputs[0])
        move_scales(sim)
        with bypassed(sim):  # as without QAT, whose ranges would be stale
            check_reestimation(sim, inputs)
    if not _is_finite(sim, inputs):
        raise IllConditioned("signals overflow with random weights")
    x = inputs[1]
    for dtype in (torch.float32, torch.float64):
        precise = sim if dtype == torch.float32 else copy.deepcopy(sim).double()
        folded, fold_report = fold_batch_norms(precise)
        layers = layer_difference(precise, folded, fold_report.folded, x.to(dtype))
        wanted, got = outputs(precise, x.to(dtype)), outputs(folded, x.to(dtype))
        row |= {f"logits_{str(dtype)[6:]}": relative(wanted, got), f"layers_{str(dtype)[6:]}": layers}
        if dtype == torch.float32:
            row["rounding"] = relative(outputs(copy.deepcopy(folded).double(), x.double()), got)
            check_checkpoint(folded, model, sim, x)
            row |= check_account(model, fold_report, report.unreached_bns, x)
        del precise, folded
    # A deep network with random weights multiplies every rounding on its way to the logits, folded or not.
    limits = {"logits_float32": max(1e-5, 3 * row["rounding"])}
    limits["logits_float64"] = max(1e-9, 3 * row["rounding"] * 2**-29)
    if row["rounding"] > 1e-3 and gammas != "positive":
        raise IllConditioned("rounding errors outgrow the signals")
    wrong = [f"{what} by {row[what]:.1e}, more than {limit:.1e}" for what, limit in limits.items() if row[what] > limit]
    return {**row, "status": "wrong", "error": f"folding changes {', '.join(wrong)}"} if wrong else row


def build(source: str, name: str) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """A network with random weights, and input shapes ``[C, H, W]`` to try, smallest first."""
    if source in packages.SOURCES:
        return packages.SOURCES[source][1](name)
    if source == "timm":
        import timm

        model = timm.create_model(name)
        default = tuple(model.default_cfg["input_size"])
        sizes = [] if model.default_cfg.get("fixed_input_size") else [(3, 64, 64), (3, 96, 96), (3, 128, 128)]
        return model, [*sizes, default]
    import torchvision

    if name.endswith("_backbone"):
        return detection_backbone(name), [(3, 96, 96)]
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if builder.__module__.startswith("torchvision.models.segmentation"):
        options |= {"weights_backbone": None, "aux_loss": None if name.startswith("lraspp") else True}
        return builder(**options), [(3, 64, 64)]
    if builder.__module__.startswith("torchvision.models.video"):
        return builder(**options), [(3, 16, 64, 64), (3, 16, 224, 224)]
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return builder(**options), [(3, 64, 64), (3, 224, 224), (3, 299, 299)]


def detection_backbone(name: str) -> nn.Module:
    """The backbone of a torchvision detector with frozen BN, as its pretrained weights come."""
    from torchvision.models import detection, mobilenet_v3_large

    if name == "fasterrcnn_resnet50_fpn_backbone":
        return detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
        )
    if name == "fasterrcnn_mobilenet_v3_large_fpn_backbone":
        net = mobilenet_v3_large(weights=None, norm_layer=FrozenBatchNorm2d)
        return detection.backbone_utils._mobilenet_extractor(net, True, 6)
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone


def first_that_fits(model: nn.Module, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Three batches of unequal size, of the first shape that the network takes in both modes."""
    error: Exception = ValueError("no size to try")
    for shape in sizes:
        batches = [torch.randn(size, *shape) * (1 + i / 8) + i / 16 for i, size in enumerate((5, 3, 6))]
        try:
            with torch.no_grad():
                for training in (True, False):
                    copy.deepcopy(model).train(training)(batches[1])
            return batches
        except (RuntimeError, ValueError, AssertionError) as caught:
            error = caught
    raise error


@torch.no_grad()
def randomize(model: nn.Module, batches: Sequence[Tensor], gammas: str) -> None:
    """Random gammas, betas, and running statistics near those of the data, so that signals neither vanish nor grow
    from layer to layer. Parameters that are all zero become random.

    gammas: "any sign, zero": half are negative, and one of each BN is zero. Or "positive", with betas as they were and
    the statistics of the data.
    """
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    for module in model.modules():
        if isinstance(module, BNS) and module.weight is not None:
            module.weight.copy_(SPREAD * (0.5 + torch.rand(module.weight.shape)))
            if gammas != "positive":
                module.weight *= torch.randint(0, 2, module.weight.shape) * 2.0 - 1
                module.weight[:1] *= float(len(module.weight) == 1)  # of a BN of one channel, all would be zero
                module.bias.copy_(SPREAD * (0.25 + torch.randn(module.bias.shape) / 2))
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
    for bn in momenta:
        bn.momentum = 1.0
    model.train()(batches[-1])
    for bn, momentum in momenta.items():
        bn.momentum = momentum
    for module in model.modules():
        if isinstance(module, BNS) and module.running_mean is not None and gammas != "positive":
            noise = torch.randn(module.running_mean.shape)
            module.running_mean += noise * module.running_var.sqrt() / 4
            module.running_var *= torch.rand(module.running_var.shape) + 0.5
    model.eval()
    if not all(bool(y.isfinite().all()) for x in batches for y in _tensors(model(x))):
        raise IllConditioned("signals overflow with random weights")


def check_weights(model: nn.Module, sim: nn.Module) -> dict[str, Any]:
    """Every conv and linear weight is quantized at 4 bits per channel, or named."""
    quantizers = weight_quantizers(sim)
    named = [name for name, _ in sim_report(sim).unquantized]
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    left = [name for name in layers if name not in quantizers]
    silent = [name for name in left if not any((name + ".weight" + ".").startswith(f"{n}.") for n in named)]
    if silent:
        raise Wrong(f"weights neither quantized nor named: {', '.join(silent)}")
    for name, quantizer in quantizers.items():
        if quantizer.bits != 4 or quantizer.scale.numel() == 1 != _out_channels(model.get_submodule(name)):
            raise Wrong(f"the weight of {name} is not quantized at 4 bits per channel")
    return {"weights": len(quantizers), "weights_named": len(left)}


def _out_channels(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _is_finite(sim: Any, batches: Sequence[Tensor]) -> bool:
    return all(bool(y.isfinite().all()) for x in batches for y in outputs(sim, x))


def check_training(model: nn.Module, sim: nn.Module, x: Tensor) -> None:
    """A backward pass in training mode reaches every quantized weight's scale, if it reaches the weight in the float
    network (some compute what they do not use)."""
    trained, reached = copy.deepcopy(sim).train(), copy.deepcopy(model).train()
    for network in (trained, reached):
        used = list(_tensors(network(x)))
        used = used[:1] if len(used) > 1 and sim_report(sim).modes == "same" else used  # auxiliary outputs are dropped
        loss = sum(y.float().square().mean() for y in used if y.requires_grad)
        loss.backward()  # type: ignore[union-attr]
    quantizers = weight_quantizers(trained)
    missed = [name for name, quantizer in quantizers.items() if quantizer.scale.grad is None]
    missed = [name for name in missed if reached.get_submodule(name).weight.grad is not None]
    if missed:
        raise Wrong(f"no gradient reaches the scales of {', '.join(missed[:3])}")


@torch.no_grad()
def move_scales(sim: nn.Module) -> None:
    """Scales that are no longer those of calibration, as after QAT."""
    for quantizer in (*weight_quantizers(sim).values(), *activation_quantizers(sim).values()):
        quantizer.scale *= 0.8 + 0.45 * torch.rand(quantizer.scale.shape)


@contextmanager
def telling_of_overflow() -> Iterator[None]:
    """Within the block, an error of the library about values that are not finite becomes IllConditioned."""
    try:
        yield
    except UserError as error:
        if "not finite" in str(error):
            raise IllConditioned("signals overflow with random weights") from error
        raise


def check_reestimation(sim: nn.Module, batches: Sequence[Tensor]) -> None:
    """Only BN buffers change, and undoing restores every bit."""
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    if not any(isinstance(module, _BatchNorm) for module in sim.modules()):
        return  # all are frozen
    handle = reestimate_bn_stats(sim, batches, 3)
    changed = {key for key, value in sim.state_dict().items() if not torch.equal(value, before[key])}
    stray = {key for key in changed if not key.endswith((".running_mean", ".running_var"))}
    if stray:
        raise Wrong(f"re-estimation changed {', '.join(sorted(stray)[:3])}")
    still = {name for name, m in sim.named_modules() if isinstance(m, _BatchNorm)}
    still -= {key.rpartition(".")[0] for key in changed} | {*handle.unreached, *handle.without_statistics}
    if still:
        raise Wrong(f"not re-estimated and not named: {', '.join(sorted(still)[:3])}")
    handle.remove()
    if any(not torch.equal(value, before[key]) for key, value in sim.state_dict().items()):
        raise Wrong("undoing the re-estimation does not restore the state")
    handle = reestimate_bn_stats(sim, batches, 3)
    if not _is_finite(sim, batches):  # three small batches are few for a deep network at 4 bits
        handle.remove()


@torch.no_grad()
def outputs(network: Any, x: Tensor) -> list[Tensor]:
    """All outputs, with activations unquantized."""
    with bypassed(network):
        return list(_tensors(network.eval()(x)))


@torch.no_grad()
def layer_difference(sim: Any, folded: Any, pairs: Sequence[tuple[str, str]], x: Tensor) -> float:
    """The largest relative difference between what a layer and its BN give in the simulation, and the folded layer for
    the same input; activations unquantized."""
    order = [node.target for node in sim.graph.nodes if node.op == "call_module"]
    worst = [0.0]
    handles = []
    for layer, bn in pairs:
        first, last = (layer, bn) if order.index(layer) < order.index(bn) else (bn, layer)  # or BN → depthwise conv
        inputs: list[Tensor] = []

        def compare(_: Any, __: Any, y: Tensor, layer: str = layer, inputs: list[Tensor] = inputs) -> None:
            x, module = inputs.pop(), folded.get_submodule(layer)
            z = module(x)
            difference = relative([y], [_in_shape_of(y, z)])
            worst[0] = max(worst[0], difference)
            if difference > LAYER_LIMITS[y.dtype]:  # the mean of a channel may be far larger than its spread
                own = relative([copy.deepcopy(module).double()(x.double())], [z])
                if difference > 3 * own:
                    raise Wrong(f"folding changes {layer}'s output by {difference:.1e}, its own rounding is {own:.1e}")

        handles.append(sim.get_submodule(first).register_forward_pre_hook(lambda _, args, i=inputs: i.append(args[0])))
        handles.append(sim.get_submodule(last).register_forward_hook(compare))
    with bypassed(sim):
        sim.eval()(x)
    for handle in handles:
        handle.remove()
    return worst[0]


def _in_shape_of(y: Tensor, z: Tensor) -> Tensor:
    """The output of a layer in the shape in which its BN gets it (LeViT: linear → flatten → BN)."""
    if z.shape == y.shape:
        return z
    return z.flatten(0, -2) if y.dim() == 2 else z.movedim(-1, 1)


def relative(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference, over the largest value of the tensor it is in."""
    if len(wanted) != len(got) or any(a.shape != b.shape for a, b in zip(wanted, got)):
        raise Wrong("there are other outputs, or outputs of another shape")
    if not all(bool(a.isfinite().all()) and bool(a.any()) for a in wanted):
        raise Wrong("an output is zero or not finite; the comparison says nothing")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, got))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


@torch.no_grad()
def check_checkpoint(folded: Any, model: nn.Module, sim: Any, x: Tensor) -> None:
    """What is saved and loaded gives the same outputs, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        foreign = save_folded(folded, Path(folder) / "net")
        loaded = load_folded(Path(folder) / "net", model=model if foreign else None)
    pairs = zip(_tensors(folded(x)), _tensors(loaded(x)))
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):  # NaN: 0/0 of quantized values
        raise Wrong("the loaded checkpoint gives other outputs")


def check_account(model: nn.Module, fold_report: Any, unreached: Sequence[str], x: Tensor) -> dict[str, Any]:
    """Every BN is folded or kept with a reason, and as many are folded as autograd's record of the network allows."""
    found = {name for name, module in model.named_modules() if isinstance(module, BNS)}
    folded, kept = {bn for _, bn in fold_report.folded}, dict(fold_report.kept)
    if folded | set(kept) != found or folded & set(kept):
        raise Wrong(f"unaccounted BNs: {', '.join(sorted((folded | set(kept)) ^ found)[:3])}")
    possible = foldable_bns(model, x)
    expected = {bn for bn in possible.after | possible.before if "kept whole" not in kept.get(bn, "")}
    seen = folded - (_unused(model, x) - expected)  # autograd's record does not show what is not used
    if seen != expected:
        more, less = sorted(seen - expected)[:3], sorted(expected - seen)[:3]
        raise Wrong(f"against the independent count, folded {more} as well and did not fold {less}")
    reasons = Counter(_general(reason) for reason in kept.values())
    return {"folded": len(folded), "kept": len(kept), "unreached": len(unreached), "reasons": dict(reasons)}


def _unused(model: nn.Module, x: Tensor) -> set[str]:
    """BNs on which no output depends in evaluation mode: of heads that are computed for a loss alone."""
    model = copy.deepcopy(model).eval()
    loss = sum(y.float().sum() for y in _tensors(model(x)) if y.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    bns = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name for name, bn in bns.items() if bn.weight is not None and bn.weight.grad is None}


def _general(reason: str) -> str:
    """A reason without the names of this network."""
    return re.sub(r"\b(of |the layer )[\w.]+ (has|is)\b", r"\1… \2", reason.partition(" (")[0])


def run(source: str, name: str) -> dict[str, Any]:
    """:func:`check` with the outcome as ``status``: passed, no BN, refused (with an explanation), wrong or failed."""
    started = time.perf_counter()
    row: dict[str, Any] = {"source": source, "name": name}
    try:
        row |= {"status": "passed", **check(source, name)}
        row["status"] = row["status"] if row["bns"] else "no BN"
    except UserError as error:
        row |= {"status": "refused", "error": str(error)}
    except Wrong as error:
        row |= {"status": "wrong", "error": str(error)}
    except Exception as error:  # whatever it is, it goes into the table
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
