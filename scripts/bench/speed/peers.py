"""Other libraries that do the same work, or some of it, as they document it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from scripts.bench.speed.case import EVALUATE, FOLD, INSERT, QAT, REESTIMATE, Case, Step, a_batch, a_call, many
from scripts.bench.speed.contenders import CALIBRATIONS, forward_plainly, train_plainly

PEERS = {"AIMET": "aimet_torch.quantsim", "Brevitas": "brevitas.graph.quantize", "fvcore": "fvcore.nn.precise_bn"}


def _quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stderr(io.StringIO())


def torch_update_bn(case: Case) -> dict[str, Step]:
    """Of the FP32 network: a cumulative average of BN statistics, all modules in training mode."""
    model = case.network_of()
    return {REESTIMATE: a_batch(lambda loader: update_bn(loader, model), case, case.images())}


def fvcore(case: Case) -> dict[str, Step]:
    """Of the FP32 network: precise BN, the statistics of all samples together."""
    from fvcore.nn.precise_bn import update_bn_stats

    model = case.network_of().train()
    return {
        REESTIMATE: a_batch(lambda loader: update_bn_stats(model, loader, len(loader)), case, case.images(), extra=1)
    }


def aimet_channels_last(case: Case) -> dict[str, Step]:
    """The steps of AIMET that are counted by batches, in the memory format that the others have."""
    return {name: step for name, step in aimet(case, channels_last=True).items() if name in (QAT, REESTIMATE, EVALUATE)}


def aimet(case: Case, channels_last: bool = False) -> dict[str, Step]:
    """AIMET's simulation with its own configuration for per-channel weights, in torch's default memory format."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms_to_scale
    from aimet_torch.bn_reestimation import reestimate_bn_stats
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    batches, images, network_of = (
        case.batches(channels_last), case.images(channels_last), functools.partial(case.network_of, channels_last)
    )  # fmt: skip

    def new(model: nn.Module) -> Any:
        return QuantizationSimModel(
            prepare_model(model), images[0], default_param_bw=case.weight_bits,
            default_output_bw=case.act_bits, config_file=get_path_for_per_channel_config(), in_place=True,
        )  # fmt: skip

    def calibrate(sim: Any, count: int) -> None:
        sim.compute_encodings(lambda network, _: forward_plainly(network, many(images, count)), None)

    @functools.cache
    def calibrated() -> Any:
        sim = new(network_of())
        calibrate(sim, 1)
        return sim

    def reestimate(loader: Any) -> None:
        with _quiet():
            reestimate_bn_stats(calibrated().model, loader, len(loader))

    return {
        QAT: a_batch(lambda loader: train_plainly(calibrated().model.train(), loader), case, batches),
        REESTIMATE: a_batch(reestimate, case, images, extra=1),
        EVALUATE: a_batch(lambda loader: forward_plainly(calibrated().model.eval(), loader), case, images),
        **{
            name: a_call(functools.partial(calibrate, count=count), case, calibrated)
            for name, count in CALIBRATIONS.items()
        },
        INSERT: a_call(new, case, network_of),
        FOLD: a_call(fold_all_batch_norms_to_scale, case, lambda: new(network_of())),
    }


def brevitas(case: Case) -> dict[str, Step]:
    """Brevitas's graph quantization with BN kept: learned scales, per channel for weights, in channels-last."""
    if case.act_bits != 8:
        raise ValueError("the quantizers of activations that Brevitas's table names have 8 bits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit goes
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.graph.quantize import preprocess_for_quantize, quantize
    batches, images, layers = case.batches(), case.images(), _brevitas_layers(case)

    def new(model: nn.Module) -> nn.Module:
        graph = preprocess_for_quantize(model, merge_bn=False, relu6_to_relu=False)
        return quantize(graph, compute_layer_map=layers).to(case.device)

    def calibrate(network: nn.Module, count: int) -> None:
        with torch.no_grad(), calibration_mode(network):
            forward_plainly(network, many(images, count))

    @functools.cache
    def inserted() -> nn.Module:
        return new(case.network_of())

    @functools.cache
    def calibrated() -> nn.Module:
        network = copy.deepcopy(inserted())  # one that is calibrated already observes nothing any more
        calibrate(network, 1)
        return network

    return {
        QAT: a_batch(lambda loader: train_plainly(calibrated().train(), loader), case, batches),
        REESTIMATE: a_batch(lambda loader: update_bn(loader, calibrated()), case, images),
        EVALUATE: a_batch(lambda loader: forward_plainly(calibrated().eval(), loader), case, images),
        **{
            name: a_call(functools.partial(calibrate, count=count), case, lambda: copy.deepcopy(inserted()))
            for name, count in CALIBRATIONS.items()
        },
        INSERT: a_call(new, case, case.network_of),
    }


def _brevitas_layers(case: Case) -> dict[Any, Any]:
    """Brevitas's own table of layers, but weights of so many bits, per channel, scales learned; biases float."""
    from brevitas.graph.quantize import COMPUTE_LAYER_MAP
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloat

    weights = type(
        "Weights",
        (Int8WeightPerChannelFloat,),
        {"bit_width": case.weight_bits, "scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS},
    )
    return {
        kind: made if made is None else (made[0], {**made[1], "weight_quant": weights, "bias_quant": None})
        for kind, made in COMPUTE_LAYER_MAP.items()
        if made is None or "weight_quant" in made[1]
    }


def missing(wanted: Collection[str]) -> dict[str, str]:
    """Those of the contenders that cannot be imported here, and why."""
    found: dict[str, str] = {}
    for name, module in PEERS.items():
        if not any(contender.startswith(name) for contender in wanted):
            continue
        try:
            with warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                __import__(module)
        except Exception as error:  # an import of theirs may fail in any way beside another version of torch
            found[name] = f"{type(error).__name__}: {error}"
    return found
