"""A batch norm and the quantizer behind it as one step: what both alone compute, with less kept for gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnre_exp.quantsim.quantizers.after_batch_norm import can_be_joined
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer


def without_statistics(bn: nn.Module) -> nn.Module:
    bn.track_running_stats = False  # as some do for a while, to train without moving the statistics
    return bn


def patched(bn: nn.Module) -> nn.Module:
    bn.forward = lambda x: 2 * F.batch_norm(x, None, None, training=True)
    return bn


BATCH_NORMS = {
    "1d": (lambda: nn.BatchNorm1d(6), (8, 6)),
    "2d": (lambda: nn.BatchNorm2d(6), (4, 6, 5, 3)),
    "2d, channels-last": (lambda: nn.BatchNorm2d(6), (4, 6, 5, 3)),
    "3d": (lambda: nn.BatchNorm3d(6, momentum=0.3, eps=0.01), (2, 6, 3, 4, 2)),
    "average": (lambda: nn.BatchNorm2d(6, momentum=None), (4, 6, 5, 3)),
    "not affine": (lambda: nn.BatchNorm2d(6, affine=False), (4, 6, 5, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 3)),
    "statistics kept": (lambda: without_statistics(nn.BatchNorm2d(6)), (4, 6, 5, 3)),
    "patched": (lambda: patched(nn.BatchNorm2d(6)), (4, 6, 5, 3)),
    "frozen": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 5, 3)),
}
IS_JOINED = ("1d", "2d", "2d, channels-last", "3d")
RELUS = {"no ReLU": lambda: None, "ReLU": nn.ReLU, "ReLU6": nn.ReLU6}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    make, shape = BATCH_NORMS[kind]
    bn = make().to(dtype)
    for parameter in bn.parameters():
        nn.init.normal_(parameter, mean=1.0)
    x = torch.randn(shape, dtype=dtype) * 4
    return bn, x.contiguous(memory_format=torch.channels_last) if "last" in kind else x


def quantizer(is_unsigned: bool, bits: int, high: float) -> ActivationQuantizer:
    made = ActivationQuantizer(bits, is_unsigned, learned=True).double()
    made.set_range(0.0 if is_unsigned else -2.0, high)
    return made


@pytest.mark.parametrize("kind", BATCH_NORMS)
@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize(("bits", "high"), [(4, 3.0), (8, 8.0), (12, 3.0)])
def test_values_gradients_and_statistics_are_those_of_both_alone(kind, relu, bits, high):
    bn, x = made(kind)
    activation, quantize = RELUS[relu](), quantizer(relu != "no ReLU", bits, high)
    assert can_be_joined(x, bn) == (kind in IS_JOINED)
    found = []
    for is_joined in (True, False):
        own = copy.deepcopy(bn), copy.deepcopy(quantize), x.clone(memory_format=torch.preserve_format).requires_grad_()
        norm, end, given = own
        if is_joined:
            y = end.after_batch_norm(given, activation, norm)
        else:
            value = norm(given)
            y = end(value if activation is None else activation(value))
        torch.manual_seed(7)
        y.backward(torch.randn_like(y))
        gradients = [given.grad, *(p.grad for p in (*norm.parameters(), *end.parameters()))]
        found.append((y.detach(), gradients, norm.state_dict()))
    (y, gradients, state), (expected_y, expected, expected_state) = found
    assert torch.equal(y, expected_y) and y.stride() == expected_y.stride()
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


def test_what_the_batch_norm_makes_is_not_kept():
    bn, x = made("2d", torch.float32)
    quantize, kept = quantizer(False, 8, 3.0).float(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantize.after_batch_norm(x.requires_grad_(), None, bn)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    assert large == {x.data_ptr(), y.data_ptr()}


def test_a_hook_on_the_batch_norm_sees_what_it_computes():
    bn, x = made("2d")
    quantize, seen = quantizer(False, 8, 3.0), []
    with bn.register_forward_hook(lambda _, args, value: seen.append(value.detach().clone())):
        quantize.after_batch_norm(x, None, bn)
    assert len(seen) == 1 and torch.equal(seen[0], copy.deepcopy(bn)(x).detach())


@pytest.mark.parametrize(("shape", "message"), [((1, 6, 1, 1), "more than 1 value per channel"), ((4, 6), "4D input")])
def test_a_batch_norm_refuses_what_it_always_does(shape, message):
    bn, _ = made("2d")
    with pytest.raises(ValueError, match=message):
        quantizer(False, 8, 3.0).after_batch_norm(torch.randn(shape, dtype=torch.float64), None, bn)


def test_other_types_and_no_gradients_are_left_to_the_batch_norm():
    bn, x = made("2d", torch.float32)
    assert can_be_joined(x, bn)
    assert not can_be_joined(x.bfloat16(), bn) and not can_be_joined(x.double(), bn)
    assert not can_be_joined(x, nn.Identity()) and not can_be_joined(x, nn.SyncBatchNorm(6))
    with torch.no_grad():
        assert not can_be_joined(x, bn)
