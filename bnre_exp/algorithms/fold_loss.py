"""What folding will cost, told before it is done: where weights have to be rounded a second time, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bnre_exp.algorithms.fold import bn_affine, fold_batch_norms
from bnre_exp.quantsim.groups import find_groups, per_output_channel
from bnre_exp.quantsim.nodes import module_of
from bnre_exp.quantsim.quantizers.layout import layout_of
from bnre_exp.quantsim.sim import graphs_of
from bnre_exp.quantsim.whole import named

REMEDIES = {
    "one scale for the whole tensor": "quantize weights per channel (per_channel=true)",
    "fold.mode=weight": "fold into the scale (fold.mode=scale)",
}


@dataclass(frozen=True)
class FoldLoss:
    """What folding costs a layer. error: of the folded weights, relative to what BN makes of the quantized ones (norm
    of the difference divided by the norm); bn: the one that is folded, "" if none is; reason: why they are not the
    same; remedy: what to do, "" if nothing is known."""

    layer: str
    bn: str
    error: float
    reason: str
    remedy: str


@torch.no_grad()
def fold_loss(sim: nn.Module, mode: str = "scale") -> tuple[FoldLoss, ...]:
    """The layers of a simulation that :func:`~bnre_exp.fold_batch_norms` would change, with how much; ``sim`` stays as
    it is. Empty where folding is exact. Raises ``UserError`` as folding does.
    """
    losses = []
    for part, graph in graphs_of(sim).items():
        folded, report = fold_batch_norms(graph, mode)
        reasons = dict(report.lossy)
        for group in find_groups(graph).groups:
            name = str(group.layer.target)
            if name in reasons:
                error, reason = _error(graph, folded, group), reasons.pop(name)
                remedy = next((way for why, way in REMEDIES.items() if why in reason), "")
                bn = "" if group.bn is None else named(part, str(group.bn.target))
                losses.append(FoldLoss(named(part, name), bn, error, reason, remedy))
    return tuple(losses)


def _error(graph: fx.GraphModule, folded: fx.GraphModule, group: Any) -> float:
    """Relative error of the folded weights of a group's layer."""
    layer: Any = module_of(group.layer)
    exact = layer.weight.double()
    if group.bn is not None:
        exact = exact * layout_of(layer).expand(per_output_channel(group, bn_affine(module_of(group.bn)).gain))
    found = folded.get_submodule(str(group.layer.target)).weight.double()
    norm = float(exact.norm())
    return float((found - exact).norm()) / norm if norm else 0.0
