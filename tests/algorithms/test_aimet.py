"""AIMET, which defines the method, as a peer: same statistics, same folded weights, and a drop-in replacement."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from bnre_exp import QuantScheme, calibrate, fold_batch_norms, quantize, reestimate_bn_stats, weight_quantizers
from tests.networks import flat_cnn, randomize, unequal_batches

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from aimet_torch.batch_norm_fold import fold_all_batch_norms_to_scale
    from aimet_torch.bn_reestimation import reestimate_bn_stats as aimet_reestimate_bn_stats
    from aimet_torch.quantsim import QuantizationSimModel

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = unequal_batches((3, 8, 8), sizes=(8, 5, 11, 3, 7))
PER_CHANNEL = {
    "defaults": {
        "ops": {"is_output_quantized": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroups": [],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def network() -> nn.Sequential:
    """A flat network in which no channel's largest weight is negative, so that AIMET, whose grid reaches down to
    -2^(b-1), uses only codes that the narrow range has too."""
    model = randomize(flat_cnn())
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                rows = layer.weight.flatten(1)
                extreme = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
                layer.weight.mul_(extreme.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
    return model.eval()


def aimet_sim(model: nn.Module, folder, activations: bool) -> QuantizationSimModel:
    config = folder / "per_channel.json"
    config.write_text(json.dumps(PER_CHANNEL))
    sim = QuantizationSimModel(
        model, BATCHES[0], default_param_bw=4, default_output_bw=8, config_file=str(config), in_place=False
    )
    if not activations:
        for module in sim.model:
            for quantizers in (module.input_quantizers, module.output_quantizers):
                quantizers[0] = None
    sim.compute_encodings(lambda network, _: [network(x) for x in BATCHES], None)
    return sim


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


@pytest.mark.parametrize("num_batches", [1, 2, 3, 5])
def test_same_statistics_on_the_float_network(num_batches):
    ours, theirs = network(), network()
    reestimate_bn_stats(ours, BATCHES, num_batches)
    aimet_reestimate_bn_stats(theirs, BATCHES, num_batches)
    assert len(statistics(ours)) == 6
    torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_batches", [1, 3, 5])
@pytest.mark.parametrize("forward_fn", [None, lambda model, batch: model(batch)])
def test_drop_in_on_its_own_simulation(num_batches, forward_fn, tmp_path):
    model = aimet_sim(network(), tmp_path, activations=True).model
    before = statistics(model)
    handle = aimet_reestimate_bn_stats(model, BATCHES, num_batches, forward_fn)
    theirs = statistics(model)
    handle.remove()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    handle = reestimate_bn_stats(model, BATCHES, num_batches, forward_fn)
    torch.testing.assert_close(statistics(model), theirs, rtol=1e-5, atol=1e-6)
    handle.remove()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("num_batches", [2, 5])
def test_same_statistics_and_same_fold_with_its_weight_scales(num_batches, tmp_path):
    model = network()
    theirs = aimet_sim(model, tmp_path, activations=False)
    ours = quantize(model, BATCHES[0], QuantScheme(weight_bits=4, act_bits=None))
    layers = {"0": 0, "3": 3, "6": 6, "11": 11}
    with torch.no_grad():
        for name, quantizer in weight_quantizers(ours).items():
            quantizer.scale.copy_(theirs.model[layers[name]].param_quantizers["weight"].get_scale().flatten())
            codes = (
                theirs.model[layers[name]].weight / theirs.model[layers[name]].param_quantizers["weight"].get_scale()
            )
            assert int(codes.round().min()) > -8
        torch.testing.assert_close(ours.eval()(BATCHES[1]), theirs.model(BATCHES[1]), rtol=1e-4, atol=1e-5)
    reestimate_bn_stats(ours, BATCHES, num_batches)
    aimet_reestimate_bn_stats(theirs.model, BATCHES, num_batches)
    torch.testing.assert_close(statistics(ours), statistics(theirs.model), rtol=1e-5, atol=1e-6)
    fold_all_batch_norms_to_scale(theirs)
    folded, report = fold_batch_norms(ours)
    assert len(report.folded) == 3
    for name, index in layers.items():
        layer, peer = folded.get_submodule(name), theirs.model[index]
        quantizer = peer.param_quantizers["weight"]
        alive = quantizer.get_scale().flatten() > 2e-7  # AIMET gives gamma = 0 a scale of 1e-7; ours has codes 0 there
        assert int(alive.sum()) >= len(alive) - 1
        scale = layer.parametrizations.weight[0].scale
        torch.testing.assert_close(scale[alive], quantizer.get_scale().flatten()[alive], rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.weight[alive], quantizer(peer.weight)[alive], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.bias, peer.bias, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(folded(BATCHES[1]), theirs.model(BATCHES[1]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_full_grid_is_theirs(tmp_path):
    """Down to -2^(b-1), in each channel whose largest weight is negative, before folding and after it."""
    model = randomize(flat_cnn()).eval()
    for bn in (model[1], model[4], model[7]):
        bn.weight.abs_().add_(0.1)
    theirs = aimet_sim(model, tmp_path, activations=False)
    ours = quantize(model, BATCHES[0], QuantScheme(weight_bits=4, act_bits=None, weight_grid="full")).eval()
    for name, quantizer in weight_quantizers(ours).items():
        peer, layer = theirs.model[int(name)], ours.get_submodule(name)
        quantizer.scale.copy_(peer.param_quantizers["weight"].get_scale().flatten())
        assert int(quantizer.codes(layer.parametrizations.weight.original).min()) == -8
        torch.testing.assert_close(layer.weight, peer.param_quantizers["weight"](peer.weight), rtol=1e-5, atol=1e-7)
    fold_all_batch_norms_to_scale(theirs)
    folded, report = fold_batch_norms(ours)
    assert len(report.folded) == 3 and report.lossy == ()
    for name in weight_quantizers(ours):
        peer = theirs.model[int(name)]
        wanted = peer.param_quantizers["weight"](peer.weight)
        torch.testing.assert_close(folded.get_submodule(name).weight, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(folded(BATCHES[1]), theirs.model(BATCHES[1]), rtol=1e-4, atol=1e-4)


def test_theirs_runs_on_our_simulation():
    sims = []
    for reestimate in (reestimate_bn_stats, aimet_reestimate_bn_stats):
        sim = quantize(network(), BATCHES[0], QuantScheme(weight_bits=4, act_bits=8))
        calibrate(sim, BATCHES, 5)
        reestimate(sim, BATCHES, 4)
        sims.append(sim)
    torch.testing.assert_close(statistics(sims[0]), statistics(sims[1]), rtol=1e-5, atol=1e-6)
