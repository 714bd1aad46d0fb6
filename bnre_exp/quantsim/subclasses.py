"""Conv and linear layers whose class is not torch's own: which of them compute what torch's class does?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnre_exp.quantsim.layout import LAYERS, layout_of, out_channels


def as_plain_layer(module: nn.Module) -> nn.Module:
    """A layer whose forward does what its base class's does, as that class with the same parameters; else ``module``.

    timm's ``Linear`` is one. A checkpoint can hold such a layer without the model's code.
    """
    is_subclass = isinstance(module, LAYERS) and not type(module).__module__.startswith("torch.nn.")
    if not is_subclass or parametrize.is_parametrized(module):
        return module
    return _as_base(module) if _is_like_its_base(module) else module


def _as_base(layer: nn.Module) -> nn.Module:
    """A layer of the base class that shares the parameters, without any submodules."""
    kind: Any = next(base for base in type(layer).__mro__ if base in LAYERS)
    plain = kind.__new__(kind)
    plain.__dict__.update(layer.__dict__)
    plain._modules = {}
    return plain  # type: ignore[no-any-return]


def scales_with_weight(layer: nn.Module) -> bool:
    """Whether the output is linear in the weight, channel by channel, and the bias is added to it as it is.

    That is what folding relies on, and what makes a quantized weight the one that is computed with. A layer that
    standardizes its weight first (StdConv) is not so; one that pads its input in its own way (timm's Conv2dSame) is.
    """
    if type(layer) in LAYERS or parametrize.is_parametrized(layer):
        return True
    try:
        return all(_scales(layer, training) for training in (False, True))
    except Exception:  # a forward of someone else's, on made-up data, can fail in any way
        return False


@torch.no_grad()
def _scales(layer: nn.Module, training: bool) -> bool:
    first, generator = _double(layer, training), torch.Generator().manual_seed(0)
    second, count = copy.deepcopy(first), out_channels(layer)
    gain = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
    shift = torch.randn(count, generator=generator, dtype=torch.float64)
    bias = torch.zeros(count, dtype=torch.float64) if first.bias is None else first.bias
    second.weight = nn.Parameter(first.weight * layout_of(layer).expand(gain))
    second.bias = nn.Parameter(bias * gain + shift)
    for x in _probes(layer):
        y = first(x)
        shape = [-1] if isinstance(layer, nn.Linear) else [-1, *(1,) * (y.dim() - 2)]
        if not torch.allclose(second(x), y * gain.reshape(shape) + shift.reshape(shape), rtol=1e-9, atol=1e-9):
            return False
    return True


@torch.no_grad()
def _is_like_its_base(layer: nn.Module) -> bool:
    try:
        for training in (False, True):
            own = _double(layer, training)
            plain = _as_base(own)
            if not all(torch.equal(own(x), plain(x)) for x in _probes(layer)):
                return False
    except Exception:  # as above
        return False
    return True


def _double(layer: nn.Module, training: bool) -> Any:
    own: Any = copy.deepcopy(layer).cpu().double().train(training)
    generator = torch.Generator().manual_seed(1)
    for parameter in own.parameters():  # whatever its values are; zeros would tell nothing
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return own


def _probes(layer: Any) -> list[Tensor]:
    """Random inputs: of odd and even sizes, since padding may depend on them."""
    generator = torch.Generator().manual_seed(2)
    if isinstance(layer, nn.Linear):
        shapes = [(3, layer.in_features), (2, 3, layer.in_features)]
    else:
        spans = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation)]
        shapes = [(2, layer.in_channels, *(2 * span + extra for span in spans)) for extra in (0, 1, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
