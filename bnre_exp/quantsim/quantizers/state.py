"""What quantizers keep in a network's state: scales in full precision, and the scheme that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError

HALF = (torch.float16, torch.bfloat16)
SCHEME_KEY = "_extra_state"  # where torch puts what get_extra_state returns


def precise(dtype: torch.dtype) -> torch.dtype:
    """What codes and scales are computed in for values of a dtype: half types hold neither."""
    return torch.float32 if dtype in HALF else dtype


def code_dtype(bits: int) -> torch.dtype:
    """The smallest signed type of integers that holds codes of so many bits."""
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


class Quantizer(nn.Module):
    """A module with scales.

    Casting a network to half precision leaves scales and zero points as they are, since half types hold no step below
    6e-8 (float16) and no code above 256 (bfloat16) exactly. A state dict holds the scheme, as integers under
    ``_extra_state``; loading that of another scheme raises ``UserError``, and one without (written before) loads.
    """

    SCHEME: ClassVar[tuple[str, ...]]  # names of the attributes that say how it quantizes, integers or bools

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def kept_precise(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALF and tensor.dtype not in HALF else moved

        return super()._apply(kept_precise, recurse)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Tensor:
        """The values of SCHEME; a tensor, which every format of files holds."""
        return torch.tensor([int(getattr(self, name)) for name in self.SCHEME], device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do: it was compared before."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict = {prefix + SCHEME_KEY: self.get_extra_state(), **state_dict}
        self._check_scheme(prefix, state_dict[prefix + SCHEME_KEY])
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[no-untyped-call]

    def _check_scheme(self, prefix: str, state: Any) -> None:
        own = [getattr(self, name) for name in self.SCHEME]
        # Rounded, since averages of state dicts (EMA) are no integers.
        saved = [round(value) for value in state.flatten().tolist()] if isinstance(state, Tensor) else [state]
        if saved == [int(value) for value in own]:
            return
        layer = prefix.partition(".parametrizations.")[0].rstrip(".") or type(self).__name__
        if len(saved) != len(own):
            raise UserError(
                f"The state dict is of another kind of network, as {layer} shows: that of a simulation and that of a "
                "folded network do not fit each other. Load it into what it was taken from."
            )
        given = [type(value)(number) for value, number in zip(own, saved)]
        raise UserError(
            f"The state dict is of another quantization scheme: {layer} was saved with {self._scheme_text(given)}, and "
            f"has {self._scheme_text(own)} here. Load it into a network that was quantized with the scheme of then."
        )

    def _scheme_text(self, values: list[Any]) -> str:
        return ", ".join(f"{name}={value}" for name, value in zip(self.SCHEME, values))


def scheme_keys(module: nn.Module) -> set[str]:
    """Keys of a module's state dict that hold schemes of quantizers, and no values that it computes with."""
    found = {path for path, child in module.named_modules() if isinstance(child, Quantizer)}
    return {f"{path}.{SCHEME_KEY}" if path else SCHEME_KEY for path in found}
