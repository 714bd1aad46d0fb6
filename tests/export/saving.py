"""Folded networks to save, and what it means that a loaded one is the same."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor, fx, nn

from bnre_exp import QuantScheme, UserError, calibrate, fold_batch_norms, quantize, quantize_biases
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def folded_network(model: nn.Module, *x: Tensor, bias_bits: int = 32, leaf_modules=(), **scheme) -> fx.GraphModule:
    """A calibrated, folded simulation with integer biases."""
    sim = quantize(model, x, QuantScheme(**scheme), leaf_modules=leaf_modules)
    calibrate(sim, [x], num_batches=1, forward_fn=lambda network, batch: network(*batch))
    folded, _ = fold_batch_norms(sim)
    quantize_biases(folded, bias_bits)
    return folded


def assert_same(folded: nn.Module, loaded: nn.Module, *x: Tensor) -> None:
    """Same state, down to dtypes, strides and what is trainable; same outputs, bit for bit; evaluation mode."""
    expected, actual = folded.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].stride() == tensor.stride(), name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert trainable(folded) == trainable(loaded)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(*x), folded.eval()(*x), rtol=0, atol=0, equal_nan=True)


def trainable(network: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in network.named_parameters(remove_duplicate=False)}


def round_trip(folded: nn.Module, path, *x: Tensor) -> fx.GraphModule:
    """Save and load without a model; the result is checked and returned."""
    assert save_folded(folded, path) == ()
    loaded = load_folded(path)
    assert_same(folded, loaded, *x)
    return loaded


def edit(checkpoint, change):
    """Change network.json, as someone would who can compute a SHA-256 as well."""
    document = json.loads((checkpoint / "network.json").read_text())
    change(document)
    document["weights_sha256"] = hashlib.sha256((checkpoint / "weights.safetensors").read_bytes()).hexdigest()
    (checkpoint / "network.json").write_text(json.dumps(document))


def refused(checkpoint, match):
    with pytest.raises(UserError, match=match) as caught:
        load_folded(checkpoint)
    assert "Traceback" not in str(caught.value) and str(checkpoint) in str(caught.value)
    return str(caught.value)
