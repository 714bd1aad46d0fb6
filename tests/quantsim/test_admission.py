"""What quantize takes, out of its wrappers, and one plain message for each thing that it does not take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from bnre_exp import (
    QuantScheme,
    UserError,
    activation_quantizers,
    calibrate,
    fold_batch_norms,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    sim_report,
    train,
)
from tests.networks import flat_cnn, randomize

X = torch.randn(4, 3, 16, 16)


def timm_ema(model: nn.Module) -> nn.Module:
    return pytest.importorskip("timm.utils").ModelEmaV2(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS = {
    "DataParallel": nn.DataParallel, "OptimizedModule": compiled, "AveragedModel": AveragedModel,
    "ModelEmaV2": timm_ema, "DataParallel, OptimizedModule": lambda m: nn.DataParallel(compiled(m)),
}  # fmt: skip


@pytest.mark.parametrize("names", WRAPPERS)
def test_a_wrapped_network_is_taken_out_and_that_is_said(names):
    model = randomize(flat_cnn()).eval()
    plain, sim = quantize(model, X), quantize(WRAPPERS[names](model).eval(), X)
    for network in (plain, sim):
        calibrate(network, [X], 1)
    assert torch.equal(sim(X), plain(X)) and sim.state_dict().keys() == plain.state_dict().keys()
    assert sim_report(sim).notes == tuple(f"the network is taken out of {name}" for name in names.split(", "))


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_a_wrapper_within_a_network_is_left_out_of_the_simulation_only(wrap):
    inner = randomize(flat_cnn()).eval()
    model = nn.Sequential(wrap(inner), nn.Linear(10, 3)).eval()
    sim = quantize(model, X, QuantScheme(act_bits=None))
    assert sim_report(sim).notes == (f"0 is taken out of {type(model[0]).__name__}",)
    expected = quantize(nn.Sequential(inner, model[1]).eval(), X, QuantScheme(act_bits=None))
    assert torch.equal(sim(X), expected(X)) and isinstance(model[0], type(wrap(inner)))


def scripted() -> nn.Module:
    return torch.jit.script(flat_cnn())


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return flat_cnn()


def with_non_leaf() -> nn.Module:
    model = flat_cnn()
    model[0].extra = model[0].weight * 2
    return model


def with_non_leaf_buffer() -> nn.Module:
    model = flat_cnn()
    model[1].running_mean = model[1].running_mean + model[1].weight
    return model


def pruned(layer: int, name: str) -> nn.Module:
    model = flat_cnn()
    prune.l1_unstructured(model[layer], name, 0.3)
    return model


def parametrized(layer: int, name: str) -> nn.Module:
    model = flat_cnn()
    parametrize.register_parametrization(model[layer], name, nn.Tanh())
    return model


def simulation() -> nn.Module:
    return quantize(flat_cnn(), X)


def folded() -> nn.Module:
    sim = quantize(flat_cnn(), X)
    calibrate(sim, [X], 1)
    return fold_batch_norms(sim)[0]


def uncopyable() -> nn.Module:
    model = flat_cnn()
    model.batches = (x for x in [])
    return model


def exported() -> nn.Module:
    return torch.export.export(flat_cnn().eval(), (X,)).module()


REFUSED = {
    "a name": (lambda: "resnet18", "expected a network, a torch.nn.Module, got str"),
    "a function": (lambda: flat_cnn, "got function .*call the function that builds it"),
    "script": (scripted, "The network is TorchScript"),
    "jit.trace": (lambda: torch.jit.trace(flat_cnn().eval(), X), "The network is TorchScript"),
    "script inside": (lambda: nn.Sequential(scripted()), "The module 0 is TorchScript"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "0.weight has no shape yet.*run the network once"),
    "lazy bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d()), "1.weight has no shape yet"),
    "meta": (on_meta, "0.weight is on the meta device and has no values"),
    "non-leaf": (with_non_leaf, "0.extra is computed from tensors with gradients.*detach"),
    "non-leaf buffer": (with_non_leaf_buffer, "1.running_mean is computed from tensors with gradients"),
    "pruned": (lambda: pruned(3, "weight"), r"The weight of 3 is computed by torch.nn.utils.prune.*prune.remove\("),
    "pruned bias": (lambda: pruned(11, "bias"), "The bias of 11 is computed by torch.nn.utils.prune"),
    "pruned bn": (lambda: pruned(1, "weight"), "The weight of 1 is computed by torch.nn.utils.prune"),
    "parametrized bias": (lambda: parametrized(11, "bias"), "The bias of 11 has a parametrization already"),
    "parametrized bn": (lambda: parametrized(1, "weight"), "The weight of 1 has a parametrization already"),
    "simulation": (simulation, "holds, a quantization simulation"),
    "simulation inside": (lambda: nn.Sequential(simulation()), "holds, a quantization simulation"),
    "folded": (folded, "holds, a folded network"),
    "exported": (exported, "program of torch.export.*Give the nn.Module that was exported"),
    "exported program": (lambda: torch.export.export(flat_cnn().eval(), (X,)), "program of torch.export"),
    "not to be copied": (uncopyable, "cannot be copied.*TypeError: cannot pickle 'generator' object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_one_plain_message(name):
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        quantize(make(), X)
    assert len(str(caught.value).splitlines()) == 1


def test_a_parametrized_layer_is_refused_also_where_its_weight_stays_float_unless_it_is_kept_whole():
    class Block(nn.Sequential):
        pass

    model = nn.Sequential(Block(parametrized(11, "weight")[11]), nn.Linear(10, 2))
    for scheme in (QuantScheme(weight_bits=None), QuantScheme()):
        with pytest.raises(UserError, match="The weight of 0.0 has a parametrization already"):
            quantize(model, torch.randn(2, 96), scheme)
    example = torch.randn(2, model[0][0].in_features)
    assert "kept whole" in sim_report(quantize(model, example, leaf_modules=["Block"])).unquantized[0][1]


@pytest.mark.parametrize("example", [None, {"x": X}, [], X.numpy(), torch.tensor(1.0), X[:0], X.to("meta")])
def test_the_example_is_made_of_tensors_with_values(example):
    with pytest.raises(UserError, match="example_input"):
        quantize(flat_cnn(), example)


def test_a_lazy_module_that_has_run_is_like_any_other():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    model(X)
    calibrate(sim := quantize(model.eval(), X), [X], 1)
    assert fold_batch_norms(sim)[1].folded == (("0", "1"),)


def pipeline(model: nn.Module, x: torch.Tensor, within) -> torch.Tensor:
    labels = torch.arange(len(x)) % 10
    with within():
        sim = quantize(model, x)
        calibrate(sim, [x], 1)
        reestimate_bn_stats(sim, [x], 1)
    train(sim, [(X, labels)], 1, lr=0.01)
    with within():
        network, _ = fold_batch_norms(sim)
        quantize_biases(network)
    return network(X)


def test_inference_mode_changes_nothing_wherever_it_was_on():
    model = randomize(flat_cnn()).eval()
    expected = pipeline(model, X, torch.enable_grad)
    assert torch.equal(pipeline(model, X, torch.inference_mode), expected)
    with torch.inference_mode():
        made_there, x = copy.deepcopy(model), X.clone()
    assert torch.equal(pipeline(made_there, x, torch.enable_grad), expected)
    assert torch.equal(pipeline(made_there, x, torch.inference_mode), expected)


def test_statistics_made_under_inference_mode_are_refused_where_they_cannot_be_written():
    with torch.inference_mode():
        model = randomize(flat_cnn())
    with pytest.raises(UserError, match="statistics of the batch norm 1 were made under torch.inference_mode"):
        reestimate_bn_stats(model, [X], 1)
    reestimate_bn_stats(copy.deepcopy(model), [X], 1)
    with torch.inference_mode():
        reestimate_bn_stats(model, [X], 1)


def test_ranges_made_under_inference_mode_are_refused_where_they_cannot_be_written():
    sim = quantize(randomize(flat_cnn()), X)
    with torch.inference_mode():
        copied = copy.deepcopy(sim)
    with pytest.raises(UserError, match="made under torch.inference_mode"):
        calibrate(copied, [X], 1)
    assert all(q.observer is None for q in activation_quantizers(copied).values())
