"""What must hold of a network of a zoo on its way from float to folded checkpoint. See zoo_network.py."""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).parent))
from foldable import foldable_bns  # noqa: E402
from pieces import Piece, call, tensors_in  # noqa: E402

from bnre_exp import (  # noqa: E402
    UserError,
    activation_quantizers,
    bypassed,
    load_folded,
    reestimate_bn_stats,
    save_folded,
    sim_report,
    weight_quantizers,
)
from bnre_exp.quantsim.sim import graphs_of  # noqa: E402

BNS = (_BatchNorm, FrozenBatchNorm2d)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
LAYER_LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}


class Wrong(Exception):
    """The network went through, but something that must hold does not."""


class IllConditioned(Exception):
    """Random weights made signals overflow, or rounding errors grow as large as the signals."""


def forward_fn_for(batch: Any) -> Any:
    """How the library feeds such batches: None for a tensor, which it takes itself."""
    return None if isinstance(batch, Tensor) else call


def together(rows: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums of what was counted in each piece."""
    return {key: sum(row[key] for row in rows) for key in rows[0]}


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


@torch.no_grad()
def is_finite(sim: Any, batches: Sequence[Any]) -> bool:
    """Whether all outputs are, with activations unquantized."""
    with bypassed(sim):
        return all(bool(y.isfinite().all()) for x in batches for y in tensors_in(call(sim.eval(), x)))


def check_training(model: nn.Module, sim: nn.Module, batch: Any, pieces: Sequence[Piece]) -> None:
    """A backward pass in training mode reaches every quantized weight's scale, if it reaches the weight in the float
    network (some compute what they do not use)."""
    trained, reached = copy.deepcopy(sim).train(), copy.deepcopy(model).train()
    for network in (trained, reached):
        torch.manual_seed(0)
        used = list(tensors_in(call(network, batch)))
        is_traced_once = not pieces[0].name and sim_report(sim).modes == "same"
        used = used[:1] if len(used) > 1 and is_traced_once else used  # auxiliary outputs are dropped
        loss = sum(y.float().square().mean() for y in used if y.requires_grad)
        loss.backward()  # type: ignore[union-attr]
    missed = []
    for piece in pieces:
        original = reached.get_submodule(piece.name)
        for name, quantizer in weight_quantizers(graphs_of(trained)[piece.name]).items():
            if quantizer.scale.grad is None and original.get_submodule(name).weight.grad is not None:
                missed.append(f"{piece.name}.{name}")
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


def check_reestimation(sim: nn.Module, batches: Sequence[Any]) -> None:
    """Only BN buffers change, and undoing restores every bit."""
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    if not any(isinstance(module, _BatchNorm) for module in sim.modules()):
        return  # all are frozen
    handle = reestimate_bn_stats(sim, batches, 3, forward_fn=forward_fn_for(batches[0]))
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
    handle = reestimate_bn_stats(sim, batches, 3, forward_fn=forward_fn_for(batches[0]))
    if not is_finite(sim, batches):  # three small batches are few for a deep network at 4 bits
        handle.remove()


def check_fold(
    pieces: Sequence[Piece], sim: Any, folded: Any, fold_report: Any, dtype: torch.dtype
) -> dict[str, float]:
    """How far the folded network is from the simulation, the largest of all pieces; each gets the same inputs in both,
    since boxes that are chosen between the parts of a detector jump."""
    worst: dict[str, float] = {}
    for piece in pieces:
        graph, after, inputs = graphs_of(sim)[piece.name], graphs_of(folded)[piece.name], piece.tensors(dtype)
        pairs = [(piece.inner(layer), piece.inner(bn)) for layer, bn in fold_report.folded if piece.has(bn)]
        found = {f"layers_{str(dtype)[6:]}": layer_difference(graph, after, pairs, inputs)}
        got = outputs(after, inputs)
        found[f"logits_{str(dtype)[6:]}"] = relative(outputs(graph, inputs), got)
        if dtype == torch.float32:
            precise = outputs(copy.deepcopy(after).double(), piece.tensors(torch.float64))
            found["rounding"] = relative(precise, got)
        worst = {key: max(value, worst.get(key, 0.0)) for key, value in found.items()}
    return worst


@torch.no_grad()
def outputs(network: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All outputs, with activations unquantized."""
    torch.manual_seed(0)  # some networks draw numbers in evaluation mode
    with bypassed(network):
        return list(tensors_in(network.eval()(*inputs)))


@torch.no_grad()
def layer_difference(sim: Any, folded: Any, pairs: Sequence[tuple[str, str]], inputs: Sequence[Tensor]) -> float:
    """The largest relative difference between what a layer and its BN give in the simulation, and the folded layer for
    the same input; activations unquantized."""
    order = [node.target for node in sim.graph.nodes if node.op == "call_module"]
    worst = [0.0]
    handles = []
    for layer, bn in pairs:
        first, last = (layer, bn) if order.index(layer) < order.index(bn) else (bn, layer)  # or BN → depthwise conv
        given: list[Tensor] = []

        def compare(_: Any, __: Any, y: Tensor, layer: str = layer, given: list[Tensor] = given) -> None:
            x, module = given.pop(), folded.get_submodule(layer)
            z = module(x)
            difference = relative([y], [_in_shape_of(y, z)])
            worst[0] = max(worst[0], difference)
            if difference > LAYER_LIMITS[y.dtype]:  # the mean of a channel may be far larger than its spread
                own = relative([copy.deepcopy(module).double()(x.double())], [z])
                if difference > 3 * own:
                    raise Wrong(f"folding changes {layer}'s output by {difference:.1e}, its own rounding is {own:.1e}")

        handles.append(sim.get_submodule(first).register_forward_pre_hook(lambda _, args, g=given: g.append(args[0])))
        handles.append(sim.get_submodule(last).register_forward_hook(compare))
    with bypassed(sim):
        sim.eval()(*inputs)
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


@torch.no_grad()
def check_checkpoint(folded: Any, model: nn.Module, batch: Any, pieces: Sequence[Piece]) -> None:
    """What is saved and loaded gives the same outputs, bit for bit: the whole network, and each piece of it."""
    with tempfile.TemporaryDirectory() as folder:
        foreign = save_folded(folded, Path(folder) / "net")
        loaded = load_folded(Path(folder) / "net", model=model if foreign or pieces[0].name else None)
    found = []
    for network in (folded, loaded):
        torch.manual_seed(0)  # some networks draw numbers in evaluation mode
        found.append([*tensors_in(call(network, batch))])
        for piece in pieces:
            found[-1] += tensors_in(graphs_of(network)[piece.name](*piece.tensors(torch.float32)))
    pairs = zip(*found, strict=True)
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):  # NaN: 0/0 of quantized values
        raise Wrong("the loaded checkpoint gives other outputs")


def check_account(count: int, pieces: Sequence[Piece], fold_report: Any) -> dict[str, Any]:
    """Every BN is folded or kept with a reason, and as many are folded as autograd's record of the network allows."""
    folded, kept = {bn for _, bn in fold_report.folded}, dict(fold_report.kept)
    if len(folded) + len(kept) != count:
        raise Wrong(f"of {count} BNs {len(folded)} are folded and {len(kept)} are kept")
    for piece in pieces:
        found = {name for name, module in piece.original.named_modules() if isinstance(module, BNS)}
        inside = {piece.inner(bn) for bn in folded if piece.has(bn)}
        left = {piece.inner(bn): reason for bn, reason in kept.items() if piece.has(bn)}
        if inside | set(left) != found or inside & set(left):
            raise Wrong(f"unaccounted BNs: {', '.join(sorted((inside | set(left)) ^ found)[:3])}")
        possible = foldable_bns(piece.original, *piece.args)
        expected = {bn for bn in possible.after | possible.before if "kept whole" not in left.get(bn, "")}
        seen = inside - (_unused(piece) - expected)  # autograd's record does not show what is not used
        if seen != expected:
            more, less = sorted(seen - expected)[:3], sorted(expected - seen)[:3]
            raise Wrong(f"against the independent count, folded {more} as well and did not fold {less}")
    reasons = Counter(_general(reason) for reason in kept.values())
    return {"folded": len(folded), "kept": len(kept), "reasons": dict(reasons)}


def _unused(piece: Piece) -> set[str]:
    """BNs on which no output depends in evaluation mode: of heads that are computed for a loss alone."""
    model = copy.deepcopy(piece.original).eval()
    loss = sum(y.float().sum() for y in tensors_in(model(*piece.args)) if y.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    bns = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name for name, bn in bns.items() if bn.weight is not None and bn.weight.grad is None}


def _general(reason: str) -> str:
    """A reason without the names of this network."""
    return re.sub(r"\b(of |the layer )[\w.]+ (has|is)\b", r"\1… \2", reason.partition(" (")[0])
