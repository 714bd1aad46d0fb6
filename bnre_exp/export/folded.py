"""Is a network folded, and are its quantizers at work?"""

from __future__ import annotations

from torch import fx, nn

from bnre_exp.algorithms.integers import IntegerLayer
from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer


def check_folded(folded: nn.Module) -> None:
    """Raise ``UserError`` unless the network is folded and its quantizers are at work."""
    if not isinstance(folded, fx.GraphModule):
        raise UserError(f"expected one that fold_batch_norms() returned, got a {type(folded).__name__}")
    for name, module in folded.named_modules():
        if isinstance(module, WeightQuantizer):
            raise UserError("it is not folded yet; call fold_batch_norms(sim) first, and save what that returns")
        if isinstance(module, IntegerLayer):
            raise UserError("it is what integer_simulation() made of a folded network; give the folded network")
        if isinstance(module, ActivationQuantizer) and (module.bypassed or module.observer is not None):
            raise UserError(f"the quantizer {name} is bypassed or being calibrated; save outside of that block")
