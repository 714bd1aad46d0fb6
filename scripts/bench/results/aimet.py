"""AIMET's pipeline, as its page on BN re-estimation describes it, on the weights, batches, steps and rates of ours."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bnre_exp import evaluate
from bnre_exp.data import Loaders
from bnre_exp.models import torchvision_model
from bnre_exp.tasks import Evaluation
from scripts.bench.results.cases import BATCHES, CALIBRATION, QAT_LR, QAT_WEIGHT_DECAY

Rows = Iterator[tuple[str, str, Evaluation, float]]  # job, row, what it measures, seconds of the work


def pipeline(network: str, fp32: Path, loaders: Loaders, weight_bits: int, act_bits: int) -> Rows:
    """Without QAT: quantized, re-estimated, ranges fitted anew. With QAT: from calibrated ranges, as documented, and
    from re-estimated statistics and ranges fitted under them, as ours starts; each trained, then re-estimated."""
    from aimet_torch.bn_reestimation import reestimate_bn_stats

    logging.disable(logging.WARNING)
    model = torchvision_model(network, num_classes=10).eval()
    model.load_state_dict(load_file(fp32))
    yield "aimet", "fp32", _evaluated(model, loaders), 0.0

    def reestimate(sim: Any, count: int) -> float:
        return _timed(lambda: reestimate_bn_stats(sim.model, loaders.fresh("reestimation"), count, _forward))

    def calibrate(sim: Any) -> float:
        return _timed(lambda: sim.compute_encodings(lambda net, _: _forward_all(net, loaders), None))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim = _simulation(model, next(iter(loaders.fresh("calibration")))[0][:2], weight_bits, act_bits)
        seconds = calibrate(sim)
        yield "aimet", "ptq", _evaluated(sim.model, loaders), seconds
        start = copy.deepcopy(sim.model.state_dict())
        seconds = reestimate(sim, BATCHES)
        yield "aimet", "reest", _evaluated(sim.model, loaders), seconds
        seconds = calibrate(sim)
        yield "aimet", "recalibrated", _evaluated(sim.model, loaders), seconds
        for job, is_prepared in (("aimet qat", False), ("aimet qat prepared", True)):
            sim.model.load_state_dict(start)
            if is_prepared:
                seconds = reestimate(sim, CALIBRATION) + calibrate(sim)
                yield job, "qat_start", _evaluated(sim.model, loaders), seconds
            seconds = _timed(lambda: _train(sim.model, loaders))
            yield job, "qat", _evaluated(sim.model, loaders), seconds
            seconds = reestimate(sim, BATCHES)
            yield job, "reest", _evaluated(sim.model, loaders), seconds


def fold_result(network: str, loaders: Loaders) -> str:
    """What AIMET's fold into scales says of a network: its error, or that it folds."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms_to_scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision_model(network, num_classes=10).eval()
        sim = _simulation(model, loaders.example(), 4, 8)
        sim.compute_encodings(lambda net, _: _forward_all(net, loaders), None)
        try:
            fold_all_batch_norms_to_scale(sim)
        except Exception as error:  # whatever it raises is what its user gets
            return f"`{type(error).__name__}: {error}`"
    return "nothing: it folds"


def _simulation(model: nn.Module, example: torch.Tensor, weight_bits: int, act_bits: int) -> Any:
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    return QuantizationSimModel(
        prepare_model(model), example, quant_scheme=QuantScheme.training_range_learning_with_tf_init,
        default_param_bw=weight_bits, default_output_bw=act_bits, config_file=get_path_for_per_channel_config(),
    )  # fmt: skip


def _train(model: nn.Module, loaders: Loaders) -> None:
    """One epoch of SGD with Nesterov's momentum, cosine: the recipe of ``bnre_exp.train``; no weight decay on BN
    parameters, biases and quantizers."""
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "quantizers" not in name]
    ids = {id(p) for p in weights}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": weights, "weight_decay": QAT_WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=QAT_LR, momentum=0.9, nesterov=True)
    loader = loaders.fresh("train")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader))
    model.train()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


@torch.no_grad()
def _forward_all(model: nn.Module, loaders: Loaders) -> None:
    for number, batch in enumerate(loaders.fresh("calibration")):
        if number == CALIBRATION:
            return
        _forward(model.eval(), batch)


def _evaluated(model: nn.Module, loaders: Loaders) -> Evaluation:
    return evaluate(model, loaders.test)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
