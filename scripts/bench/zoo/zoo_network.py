"""One network of a zoo, from the float network to its folded checkpoint, checked on the way. See zoo.py."""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).parent))
import packages  # noqa: E402
from pieces import Built, call, first_that_fits, pieces_of, shape_of, tensors_in  # noqa: E402
from zoo_checks import (  # noqa: E402
    BNS,
    IllConditioned,
    Wrong,
    check_account,
    check_checkpoint,
    check_fold,
    check_reestimation,
    check_training,
    check_weights,
    forward_fn_for,
    is_finite,
    move_scales,
    telling_of_overflow,
    together,
)

from bnre_exp import (  # noqa: E402
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    quantize,
    sim_report,
)
from bnre_exp.quantsim.sim import graphs_of  # noqa: E402

SPREAD = 0.25  # of gammas and betas: larger ones make deep random networks chaotic
UNPOOLING = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
SCHEME = QuantScheme(weight_bits=4, act_bits=8)


def check(source: str, name: str, **how: Any) -> dict[str, Any]:
    """Quantize, calibrate, re-estimate, fold, save and load one network; a row of results for the table.

    source: torchvision, timm or one of packages.py; how: more arguments of ``quantize``. Raises ``Wrong`` where a
    result is not what it must be, and what the library raises. Where random gammas make signals overflow or the network
    chaotic (a zero gamma in a chain of depthwise layers, a division by a sum of activations), all gammas are positive
    and the images larger instead, and the row says so.
    """
    try:
        return check_with(source, name, "any sign, zero", **how)
    except IllConditioned:
        return check_with(source, name, "positive", **how)


def check_with(source: str, name: str, gammas: str, **how: Any) -> dict[str, Any]:
    """:func:`check` with one choice of random gammas."""
    torch.manual_seed(0)
    model, inputs, parts = build(source, name)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    row["bns"] = sum(isinstance(module, BNS) for module in model.modules())
    if not row["bns"]:
        return row
    batches = first_that_fits(model, inputs if gammas != "positive" else [*inputs[-2:-1], *inputs])
    row["gammas"] = gammas
    row["input"] = shape_of(batches[0])
    randomize(model, batches, gammas)
    sim = quantize(model, batches[0], SCHEME, submodules=parts, **how)
    report = sim_report(sim)
    pieces = pieces_of(model, parts, batches[1])
    row["activations"] = len(activation_quantizers(sim))
    row |= together([check_weights(piece.original, graphs_of(sim)[piece.name]) for piece in pieces])
    with telling_of_overflow():
        calibrate(sim, batches, 2, forward_fn=forward_fn_for(batches[0]))
        row["modes"] = report.modes
        if report.modes != "eval":
            check_training(model, sim, batches[0], pieces)
        move_scales(sim)
        with bypassed(sim):  # as without QAT, whose ranges would be stale
            check_reestimation(sim, batches)
    if not is_finite(sim, batches):
        raise IllConditioned("signals overflow with random weights")
    for dtype in (torch.float32, torch.float64):
        precise = sim if dtype == torch.float32 else copy.deepcopy(sim).double()
        folded, fold_report = fold_batch_norms(precise)
        row |= check_fold(pieces, precise, folded, fold_report, dtype)
        if dtype == torch.float32:
            check_checkpoint(folded, model, batches[1], pieces)
            row |= check_account(row["bns"], pieces, fold_report)
        del precise, folded
    # A deep network with random weights multiplies every rounding on its way to the logits, folded or not.
    limits = {"logits_float32": max(1e-5, 3 * row["rounding"])}
    limits["logits_float64"] = max(1e-9, 3 * row["rounding"] * 2**-29)
    if any(isinstance(module, UNPOOLING) for module in model.modules()):
        del limits["logits_float32"]  # which of two equal values is the largest is a matter of rounding
    if row["rounding"] > 1e-3 and gammas != "positive":
        raise IllConditioned("rounding errors outgrow the signals")
    wrong = [f"{what} by {row[what]:.1e}, more than {limit:.1e}" for what, limit in limits.items() if row[what] > limit]
    return {**row, "status": "wrong", "error": f"folding changes {', '.join(wrong)}"} if wrong else row


def build(source: str, name: str) -> Built:
    """A network with random weights, and how to call it."""
    if source in packages.SOURCES:
        return packages.SOURCES[source][1](name)
    if source == "timm":
        import timm

        model = timm.create_model(name)
        default = tuple(model.default_cfg["input_size"])
        sizes = [] if model.default_cfg.get("fixed_input_size") else [(3, 64, 64), (3, 96, 96), (3, 128, 128)]
        return Built(model, [*sizes, default])
    import torchvision

    if name.endswith("_backbone"):
        return Built(detection_backbone(name), [(3, 96, 96)])
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if builder.__module__.startswith("torchvision.models.segmentation"):
        options |= {"weights_backbone": None, "aux_loss": None if name.startswith("lraspp") else True}
        return Built(builder(**options), [(3, 64, 64)])
    if builder.__module__.startswith("torchvision.models.video"):
        return Built(builder(**options), [(3, 16, 64, 64), (3, 16, 224, 224)])
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return Built(builder(**options), [(3, 64, 64), (3, 224, 224), (3, 299, 299)])


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


@torch.no_grad()
def randomize(model: nn.Module, batches: Sequence[Any], gammas: str) -> None:
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
    call(model.train(), batches[-1])
    for bn, momentum in momenta.items():
        bn.momentum = momentum
    for module in model.modules():
        if isinstance(module, BNS) and module.running_mean is not None and gammas != "positive":
            noise = torch.randn(module.running_mean.shape)
            module.running_mean += noise * module.running_var.sqrt() / 4
            module.running_var *= torch.rand(module.running_var.shape) + 0.5
    model.eval()
    if not all(bool(y.isfinite().all()) for x in batches for y in tensors_in(call(model, x))):
        raise IllConditioned("signals overflow with random weights")


def run(source: str, name: str) -> dict[str, Any]:
    """:func:`check` with the outcome as ``status``: passed, no BN, refused (with an explanation), wrong or failed.
    What the explanation says to do is tried, and the row tells what came of it."""
    started = time.perf_counter()
    row = {"source": source, "name": name, **outcome(source, name)}
    if row["status"] == "refused":
        row["error"] += advice_followed(source, name, row["error"])
    if "error" in row:
        row["error"] = re.sub(r"\S*/site-packages/", "", row["error"])
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def outcome(source: str, name: str, **how: Any) -> dict[str, Any]:
    """What :func:`check` returns or raises, as a row."""
    try:
        row = {"status": "passed", **check(source, name, **how)}
        return row if row["bns"] else {**row, "status": "no BN"}
    except UserError as error:
        return {"status": "refused", "error": str(error)}
    except Wrong as error:
        return {"status": "wrong", "error": str(error)}
    except Exception as error:  # whatever it is, it goes into the table
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _advised(error: str) -> list[str]:
    """The modules that an explanation says to keep whole, by name."""
    found = re.search(r"leaf_modules=\[([^]]*)\]", error)
    return re.findall(r"'([^']+)'", found[1]) if found else []


def advice_followed(source: str, name: str, error: str) -> str:
    """What comes of evaluation mode alone, and of keeping whole what an explanation names, and what the next ones
    name; whichever the explanation offers."""
    tried = ""
    if 'modes="eval"' in error:
        tried = _told('modes="eval"', outcome(source, name, modes="eval"))
    leaves: list[str] = []
    row: dict[str, Any] = {"status": "refused", "error": error}
    while row["status"] == "refused" and (more := [leaf for leaf in _advised(row["error"]) if leaf not in leaves]):
        leaves += more
        row = outcome(source, name, leaf_modules=leaves)
    return tried + (_told(f"leaf_modules={leaves}", row) if leaves else "")


def _told(how: str, row: dict[str, Any]) -> str:
    told = f"{row['folded']} of {row['bns']} BNs folded" if row["status"] == "passed" else row["error"]
    return f" (Tried: {how}: {row['status']}, {told}.)"


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
