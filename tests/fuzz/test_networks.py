"""Random networks, dtypes, wrappers, batches and schemes, all the way: what is wrong is said in a plain error, and what
comes out is what float64 gives."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp import (
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    evaluate,
    export_onnx,
    fold_batch_norms,
    integer_simulation,
    load_folded,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    save_folded,
    train,
)
from tests.fuzz.cases import Case, cases, times

CLOSE = {torch.float32: 2e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Shrinking takes longer than all cases do; a failure shows its case.
PHASES = (Phase.explicit, Phase.generate)
every = settings(
    max_examples=times(100),
    deadline=None,
    derandomize=True,
    database=None,
    phases=PHASES,
    suppress_health_check=[*HealthCheck],
)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Equal within what the rounding of a few operations in ``dtype`` may do."""
    assert found.isfinite().all() and expected.isfinite().all(), f"{what}: not finite"
    off = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-3))
    assert off < CLOSE[dtype], f"{what}: off by {off:.2e}"


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics of the batch norms that have some to estimate, by their keys."""
    names = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    state = {key: value for key, value in model.state_dict().items() if "running_" in key}
    return {key: value for key, value in state.items() if key.rpartition(".")[0] in names}


def all_the_way(case: Case) -> None:
    """From the network to a folded one that is written and read again, each step compared with float64."""
    model, x = case.model(), case.inputs()[0]
    sim = quantize(model, x, case.scheme)
    calibrate(sim, case.batches(), 3)
    train(sim, case.batches(), 1, lr=1e-3, schedule="constant")
    evaluation = evaluate(sim, case.batches())
    assert evaluation.count == sum(len(x) for x in case.inputs())
    _reestimates_as_in_float64(sim, case)
    _folds_as_in_float64(sim, x)


def _reestimates_as_in_float64(sim: fx.GraphModule, case: Case) -> None:
    if not statistics(sim):
        return
    double = copy.deepcopy(sim).double()
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    with bypassed(sim), bypassed(double):
        handle = reestimate_bn_stats(sim, case.batches(), 3)
        reestimate_bn_stats(double, [x.double() for x in case.inputs()], 3)
    changed = {key for key, value in sim.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= statistics(sim).keys(), "only statistics change"
    for (key, found), expected in zip(statistics(sim).items(), statistics(double).values()):
        assert_close(found, expected, case.dtype, key)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in sim.state_dict().items())


def _folds_as_in_float64(sim: fx.GraphModule, x: Tensor) -> None:
    sim.eval()
    double = copy.deepcopy(sim).double()
    folded, report = fold_batch_norms(sim)
    folded_double, _ = fold_batch_norms(double)
    with torch.no_grad(), bypassed(double), bypassed(folded), bypassed(folded_double):
        expected = double(x.double())
        if not report.lossy:
            assert_close(folded_double(x.double()), expected, torch.float64, "the fold in float64")
            assert_close(folded(x), expected, x.dtype, "the fold")
    _rounds_biases_by_half_a_step(folded, x.dtype)
    _rounds_as_in_float64(folded, x)
    _is_what_is_written(folded, x)


def _rounds_biases_by_half_a_step(folded: fx.GraphModule, dtype: torch.dtype) -> None:
    layers = {name: m for name, m in folded.named_modules() if getattr(m, "bias", None) is not None}
    before = {name: layer.bias.detach().double().clone() for name, layer in layers.items()}
    report = quantize_biases(folded)
    for name in report.rounded:
        bias = folded.get_submodule(name).bias.double()
        step = folded.get_submodule(name).parametrizations.bias[0].scale.double()
        rounding = torch.finfo(dtype).eps * bias.abs()
        off = (bias - before[name]).abs() / (step / 2 * (1 + 1e-6) + rounding)
        assert float(off.max()) <= 1, f"{name}: a bias is off by {float(off.max()) / 2:.2f} steps"


def _rounds_as_in_float64(folded: fx.GraphModule, x: Tensor) -> None:
    """Each quantizer, for what it is given, is at most one step from what it does in float64, up to what the rounding
    of its output to its own type makes of that."""
    for name, quantizer in activation_quantizers(folded).items():
        reference = copy.deepcopy(quantizer).double()

        def compare(module: Any, inputs: tuple[Tensor], output: Tensor, name: str = name, of: Any = reference) -> None:
            step = float(of.scale.abs()) * (1 + 1e-3)
            rounding = torch.finfo(output.dtype).eps * float(output.abs().max())
            off = float((of(inputs[0].double()) - output.double()).abs().max())
            assert off <= step + rounding, f"{name}: {off / step:.1f} steps from float64"

        quantizer.register_forward_hook(compare)
    with torch.no_grad():
        folded(x)
    for quantizer in activation_quantizers(folded).values():
        quantizer._forward_hooks.clear()


def _is_what_is_written(folded: fx.GraphModule, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = folded(x)
        save_folded(folded, Path(folder) / "net")
        assert torch.equal(load_folded(Path(folder) / "net")(x), expected), "the checkpoint computes something else"
        steps = [float(q.scale.abs()) for q in activation_quantizers(folded).values()]
        assert integer_simulation(folded)(x).isfinite().all()
        if x.dtype != torch.float32 or not steps:
            return
        try:
            export_onnx(folded, x, Path(folder) / "net.onnx")
        except UserError:
            return
        session = onnxruntime.InferenceSession(Path(folder) / "net.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # A value on the edge between two codes may fall on either side, and what follows differs by that.
        off = (torch.from_numpy(found) - expected).abs().mean() / expected.abs().mean().clamp_min(1e-3)
        assert off < 0.25, f"ONNX Runtime is off by {float(off):.2f}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_of_random_cases() -> None:
    @every
    @given(cases())
    def holds(case: Case) -> None:
        warnings.simplefilter("ignore")
        try:
            all_the_way(case)
        except UserError as error:
            assert any(re.search(said, str(error)) for said in case.refusals), f"refused: {error}"
            event("refused")
        else:
            assert not case.refusals, "it is not refused"

    holds()
