"""Folding of batch norm into the layer before it (or the depthwise layer after it)."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError, counted
from bnre_exp.quantsim.groups import PLAIN_BN, Group, find_groups, num_features, per_output_channel
from bnre_exp.quantsim.nodes import module_of, source_of
from bnre_exp.quantsim.operations import does_nothing_in_evaluation
from bnre_exp.quantsim.quantizers.affine import ChannelAffine
from bnre_exp.quantsim.quantizers.codes import set_codes
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, layout_of
from bnre_exp.quantsim.quantizers.quantizer import Dequantize, WeightQuantizer, positive
from bnre_exp.quantsim.quantizers.ranges import fit_symmetric_scale
from bnre_exp.quantsim.quantizers.state import code_dtype
from bnre_exp.quantsim.sim import sim_report
from bnre_exp.quantsim.usable import refuse_unusable
from bnre_exp.quantsim.whole import named, parts_of, with_parts

MODES = ("scale", "weight")
SMALLEST_SCALE = 1e-30  # a channel scaled below this adds nothing in float32, and its scale would near the denormals


@dataclass(frozen=True)
class FoldReport:
    """What became of every BN of the network.

    folded: ``(layer, BN)``; kept: ``(BN, reason)``, each a per-channel affine now unless the reason says otherwise;
    lossy: ``(layer, reason)`` where folding changed the function, because weights were quantized anew or codes clamped;
    notes: ``(layer, text)`` of what could have been a loss, and was none.
    """

    folded: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    lossy: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Affine:
    """y = gain * x + shift per channel, float64 ``[C]``: what a BN does in evaluation mode."""

    gain: Tensor
    shift: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def fold_batch_norms(sim: nn.Module, mode: str = "scale") -> tuple[Any, FoldReport]:
    """Return a copy of ``sim`` without BN, holding integer weight codes and scales, and a report; ``sim`` is unchanged.
    Of a network that is simulated in parts, a copy of the whole with each of them folded.

    mode "scale": the per-channel weight scale takes BN's factor and the codes change at most their sign, so the
    function stays the same up to float rounding. mode "weight": the factor multiplies the weight, whose range is fitted
    anew, which is lossy; layers with one scale for the whole tensor get this in either mode. A BN that no layer can
    take in becomes a per-channel affine and is named. On the full grid a channel whose gamma has changed its sign since
    :func:`~bnre_exp.quantize` has one code that has no counterpart; where weights have it, they get the next one, which
    is lossy.

    Raises ``UserError`` if ``sim`` is not a simulation, is folded already, for an unknown mode, and naming a weight or
    statistic that is not finite or a variance below 0.
    Source: with y = gamma * (conv(x) - mu) / sigma + beta, sigma = sqrt(running_var + eps), the weight is multiplied by
    gamma / sigma and the bias becomes beta + (bias - mu) * gamma / sigma.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    if parts_of(sim):
        return _fold_parts(sim, mode)
    scheme = sim_report(sim).scheme
    if "fold_report" in getattr(sim, "meta", {}):
        raise UserError("This network is folded already.")
    refuse_unusable(sim, "fold_batch_norms")
    folded: Any = copy.deepcopy(sim).eval()
    folded.training_graph = None  # a folded network knows no other mode than evaluation
    grouping = find_groups(folded)
    pairs, lossy, notes, done = [], [], [], set()
    for group in grouping.groups:
        name = str(group.layer.target)
        if name not in done:
            done.add(name)
            layer: Any = folded.get_submodule(name)
            plain, why_lossy, note = _fold_layer(layer, group, mode, scheme.weight_range, scheme.percentile)
            folded.set_submodule(name, plain)
            lossy += [(name, why_lossy)] if why_lossy else []
            notes += [(name, note)] if note else []
            pairs += [(name, str(group.bn.target))] if group.bn is not None else []
    kept = [(name, _keep(folded, name, reason)) for name, reason in grouping.kept.items()]
    kept += [(name, f"{reason}; stays as it is") for name, reason in grouping.functional.items()]
    kept += [(name, "never reached by the forward pass; dropped") for name in sim_report(sim).unreached_bns]
    called = {node.target for node in folded.graph.nodes if node.op == "call_module"}
    inner = [name for name, m in folded.named_modules() if isinstance(m, BATCH_NORMS) and name not in called]
    kept += [(name, "inside a module that was kept whole; stays a batch norm") for name in inner]
    for group in grouping.groups:
        if group.bn is not None:
            group.bn.replace_all_uses_with(source_of(group.bn))
            folded.graph.erase_node(group.bn)
    _drop_identities(folded)
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    folded.recompile()
    report = FoldReport(tuple(pairs), tuple(kept), tuple(lossy), tuple(notes))
    folded.meta["fold_report"] = asdict(report)
    return folded, report


def _fold_parts(sim: nn.Module, mode: str) -> tuple[nn.Module, FoldReport]:
    reports = dict[str, FoldReport]()

    def fold(part: str, network: fx.GraphModule) -> fx.GraphModule:
        try:
            folded, reports[part] = fold_batch_norms(network, mode)
        except UserError as error:
            raise UserError(f"{part}: {error}") from error
        return folded  # type: ignore[no-any-return]

    def rows(field: str) -> tuple[tuple[str, str], ...]:
        found = ((part, row) for part, report in reports.items() for row in getattr(report, field))
        return tuple((named(part, name), text) for part, (name, text) in found)

    whole = with_parts(sim, fold).eval()
    pairs = tuple(
        (named(part, layer), named(part, bn)) for part, report in reports.items() for layer, bn in report.folded
    )
    return whole, FoldReport(pairs, rows("kept"), rows("lossy"), rows("notes"))


def _drop_identities(folded: fx.GraphModule) -> None:
    """Dropout and stochastic depth."""
    for node in list(folded.graph.nodes):
        if does_nothing_in_evaluation(node):
            node.replace_all_uses_with(source_of(node))
            folded.graph.erase_node(node)


def bn_affine(bn: Any) -> _Affine:
    """Gain gamma / sigma and shift beta - mu * gamma / sigma of a BN with running statistics."""
    mean, var = bn.running_mean.double(), bn.running_var.double()
    gain = torch.rsqrt(var + bn.eps)
    gain = gain if bn.weight is None else gain * bn.weight.double()
    shift = -mean * gain
    return _Affine(gain, shift if bn.bias is None else shift + bn.bias.double())


def _keep(folded: fx.GraphModule, name: str, reason: str) -> str:
    """Put an affine in place of a BN that stays, where it acts as one; returns the reason for the report."""
    bn: Any = folded.get_submodule(name)
    if type(bn) not in PLAIN_BN or bn.running_mean is None:
        return f"{reason}; stays a batch norm"
    affine = bn_affine(bn)
    replacement = ChannelAffine(num_features(bn)).to(bn.running_mean.device)
    replacement.scale, replacement.bias = affine.gain.to(bn.running_mean.dtype), affine.shift.to(bn.running_mean.dtype)
    folded.set_submodule(name, replacement)
    return reason


def _affine_for(group: Group) -> _Affine | None:
    """The group's BN per output channel of the layer."""
    if group.bn is None:
        return None
    affine = bn_affine(module_of(group.bn))
    return _Affine(per_output_channel(group, affine.gain), per_output_channel(group, affine.shift))


def _fold_layer(
    layer: Any, group: Group, mode: str, estimator: str, percentile: float
) -> tuple[nn.Module, str | None, str | None]:
    """The layer with its BN folded into it and codes in place of a quantized weight, why that is lossy, if it is, and
    what is to be noted."""
    affine, why_lossy, note = _affine_for(group), None, None
    is_quantized = parametrize.is_parametrized(layer, "weight")
    keeps_codes = is_quantized and (affine is None or mode == "scale" and layer.parametrizations.weight[0].per_channel)
    if keeps_codes:
        why_lossy, note = _clamp(layer, affine)
    if affine is not None:
        _fold_bias(layer, affine, group.bn_before)
    if keeps_codes:
        return _with_codes(layer, affine), why_lossy, note
    if affine is not None and is_quantized:
        why = "fold.mode=weight" if layer.parametrizations.weight[0].per_channel else "one scale for the whole tensor"
        return _anew(layer, affine, estimator, percentile), f"weights quantized anew ({why})", None
    if affine is not None:
        weight = layer.weight.double() * layout_of(layer).expand(affine.gain)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)  # it may be tied
    return layer, None, None


def _fold_bias(layer: Any, affine: _Affine, bn_before: bool) -> None:
    weight: Tensor = layer.weight
    bias = torch.zeros_like(affine.shift) if layer.bias is None else layer.bias.double()
    if bn_before:
        folded = bias + layout_of(layer).rows(weight).double().sum(dim=1) * affine.shift
    else:
        folded = bias * affine.gain + affine.shift
    layer.bias = nn.Parameter(folded.to(weight.dtype), requires_grad=False)


def _clamp(layer: Any, affine: _Affine | None) -> tuple[str | None, str | None]:
    """Give weights on the full grid whose code would not fit, once it has the sign of gamma, the next one; in place.
    Returns why that is lossy, or what is to be noted: a channel on the wrong grid need not have weights at its end."""
    quantizer: WeightQuantizer = layer.parametrizations.weight[0]
    if not quantizer.full_grid:
        return None, None
    original, layout = layer.parametrizations.weight.original, quantizer.layout
    sign = torch.ones_like(quantizer.scale) if affine is None else affine.gain.sign()
    is_wrong = torch.where(quantizer.mirrored, sign > 0, sign < 0)
    codes = quantizer.codes(original)
    is_lost = (codes.abs() > quantizer.quant_max) & layout.expand(is_wrong)
    nearest = codes.sign() * quantizer.quant_max * layout.expand(positive(quantizer.scale))
    clamped_weight = torch.where(is_lost, nearest.to(original.dtype), original)
    layer.parametrizations.weight.original = nn.Parameter(clamped_weight, requires_grad=False)  # it may be tied
    channels, clamped = int(is_wrong.sum()), int(is_lost.sum())
    cause = "its BN is no longer folded" if affine is None else "gamma has changed its sign since quantize()"
    text = f"{cause}: in {counted(channels, 'channel')}, {counted(clamped, 'code')} without counterpart clamped"
    return (text, None) if clamped else (None, text if channels else None)


def _anew(layer: Any, affine: _Affine, estimator: str, percentile: float) -> nn.Module:
    """A layer whose weight takes BN's gain, with a range of its own."""
    quantizer: WeightQuantizer = layer.parametrizations.weight[0]
    layout, ends = quantizer.layout, (quantizer.quant_min, quantizer.quant_max)
    weight = layer.parametrizations.weight.original.double() * layout.expand(affine.gain)
    rows = layout.rows(weight, quantizer.per_channel)
    scale = fit_symmetric_scale(rows, ends[1], estimator, percentile, ends[0]).to(quantizer.scale.dtype)
    return _plain(layer, (weight / layout.expand(scale)).round().clamp(*ends), scale)


def _with_codes(layer: Any, affine: _Affine | None) -> nn.Module:
    """A layer with codes in place of a quantized weight, BN's gain in its scale and its sign in the codes."""
    quantizer: WeightQuantizer = layer.parametrizations.weight[0]
    scale, codes = positive(quantizer.scale).detach(), quantizer.codes(layer.parametrizations.weight.original)
    # Half types may round a weight that was clamped to the code that does not fit.
    ends = quantizer.quant_min, quantizer.quant_max
    if affine is None:
        return _plain(layer, codes.clamp(*ends), scale)
    new_scale = (scale.double() * affine.gain.abs()).to(scale.dtype)
    vanishes = new_scale < SMALLEST_SCALE
    sign = torch.where(vanishes, 0.0, affine.gain.sign())
    signed = codes * quantizer.layout.expand(sign).to(codes.dtype)
    return _plain(layer, signed.clamp(*ends), torch.where(vanishes, scale, new_scale))


def _plain(layer: Any, codes: Tensor, scale: Tensor) -> nn.Module:
    """The layer with codes times a scale as its weight."""
    quantizer: WeightQuantizer = layer.parametrizations.weight[0]
    layout, plain, dtype = quantizer.layout, _unparametrized(layer), layer.parametrizations.weight.original.dtype
    shape = (layout.ndim, layout.transposed, layout.groups, layout.in_channels)
    dequantize = Dequantize(quantizer.bits, *shape, scale, quantizer.per_channel, dtype)
    set_codes(plain, "weight", codes.to(code_dtype(quantizer.bits)), dequantize)
    return plain


def _unparametrized(layer: nn.Module) -> Any:
    """The layer as its plain class, without a weight. parametrize.remove_parametrizations is no way here: it changes
    the layer's class, which a deep copy shares with the simulation it was copied from."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    plain = kind.__new__(kind)
    plain.__dict__.update(layer.__dict__)
    plain._parameters, plain._buffers = dict(layer._parameters), dict(layer._buffers)
    plain._modules = {name: child for name, child in layer._modules.items() if name != "parametrizations"}
    return plain
