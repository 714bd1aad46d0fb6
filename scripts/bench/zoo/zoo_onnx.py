#!/usr/bin/env python
"""Take every torchvision network of the zoo through ONNX, each in a process of its own, and write a table.

    python scripts/bench/zoo/zoo_onnx.py                            # all of them
    python scripts/bench/zoo/zoo_onnx.py --filter 'mobilenet*'      # some

Checked: the re-estimated statistics of the exported model against torch's on the same batches, the same for each batch
norm given the same input, folding of the exported model, and the export of the folded, quantized network as ONNX.
Weights are random. Rows are kept in OUTPUT.csv; networks that are there are not done again unless --again is given.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fnmatch
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parent))
import pieces  # noqa: E402
import zoo  # noqa: E402
import zoo_network  # noqa: E402

import bnre_exp.onnx  # noqa: E402
from bnre_exp import (  # noqa: E402
    QuantScheme,
    UserError,
    bypassed,
    calibrate,
    export_onnx,
    fold_batch_norms,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
)
from bnre_exp.jobs.stages.reload_process import INTEGER_KERNELS, LAYERS  # noqa: E402
from bnre_exp.onnx.compare import compare_outputs  # noqa: E402
from bnre_exp.onnx_io.session import feeds, open_session  # noqa: E402

COLUMNS = (
    "name", "status", "input", "bns", "onnx_deviation", "torch_deviation", "layer_deviation", "layer_rounding",
    "folded", "kept", "fold_difference", "qdq", "qdq_logits_equal", "integer_layers", "float_layers", "seconds",
    "error",
)  # fmt: skip
Statistics = dict[str, tuple[Tensor, Tensor]]


def check(name: str) -> dict[str, Any]:
    """All checks of one network; a row of the table."""
    torch.manual_seed(0)
    model, sizes, _ = zoo_network.build("torchvision", name)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return {"status": "no BN", "bns": 0}
    batches = pieces.first_that_fits(model, sizes)
    zoo_network.randomize(model, batches, "positive")
    row: dict[str, Any] = {"input": "×".join(map(str, batches[0].shape[1:]))}
    proto = exported(model, batches[2])
    row |= check_reestimation(model, proto, batches)
    folded, report = bnre_exp.onnx.fold_batch_norms(proto)
    row |= {"folded": len(report.folded), "kept": len(report.kept)}
    row["fold_difference"] = compare_outputs(proto, folded, batches[:1])
    row |= check_qdq(model, batches)
    is_right = row["onnx_deviation"] <= 3 * row["torch_deviation"]
    are_layers_right = row["layer_deviation"] <= max(1e-5, 3 * row["layer_rounding"])
    return {**row, "status": "passed" if is_right and are_layers_right else "wrong"}


def exported(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    """The network as torch's exporter writes it, batch norms left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), (x,), dynamo=True, optimize=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    proto: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
    expanded = {name for node in proto.graph.node if node.op_type == "Expand" for name in node.output}
    for node in proto.graph.node:
        # A Conv3d without bias gets zeros of a wrong shape, [C, 2], which only the exporter's optimizer takes away.
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in expanded:
            del node.input[2]
    return proto


def check_reestimation(model: nn.Module, proto: onnx.ModelProto, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Statistics through ONNX Runtime against torch's, and torch's own rounding."""
    single, double = copy.deepcopy(model), copy.deepcopy(model).double()
    inputs = record_inputs(single, batches)
    reestimate_bn_stats(single, batches, len(batches))
    reestimate_bn_stats(double, [x.double() for x in batches], len(batches))
    through_onnx = copy.deepcopy(proto)
    handle = bnre_exp.onnx.reestimate_bn_stats(through_onnx, batches, len(batches))
    wanted, precise = statistics_of(single), statistics_of(double)
    found = onnx_statistics(through_onnx)
    reached = [bn for bn in wanted if bn in found]
    eps = {bn: model.get_submodule(bn).eps for bn in reached}
    if len(reached) != len(handle.reestimated):
        raise zoo_network.Wrong(f"{len(handle.reestimated)} batch norms re-estimated, {len(reached)} known by name")
    layer, rounding = layer_deviation(model, inputs)
    return {
        "bns": len(reached),
        "onnx_deviation": max(deviation(found[bn], wanted[bn], precise[bn][1] + eps[bn]) for bn in reached),
        "torch_deviation": max(deviation(wanted[bn], precise[bn], precise[bn][1] + eps[bn]) for bn in reached),
        "layer_deviation": layer,
        "layer_rounding": rounding,
    }


def statistics_of(model: nn.Module) -> Statistics:
    """Mean and variance by the name of the batch norm."""
    bns = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    return {name: (bn.running_mean.double(), bn.running_var.double()) for name, bn in bns.items()}  # type: ignore


def onnx_statistics(proto: onnx.ModelProto) -> Statistics:
    """The same of an exported model."""
    values = {item.name: torch.tensor(numpy_helper.to_array(item)).double() for item in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return {n.input[3].removesuffix(".running_mean"): (values[n.input[3]], values[n.input[4]]) for n in nodes}


def deviation(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], var: Tensor) -> float:
    """The largest difference of a mean, relative to the square root of ``var``, or of a variance, relative to ``var``.

    Where float32 is compared with float64, ``var`` has the batch norm's eps in it, so that the difference is the one
    that its output shows. Without, the rounding of channels whose variance is a millionth of eps drowns all others:
    torch's own changes by a factor of six between memory formats.
    """
    mean = ((first[0] - second[0]).abs() / var.sqrt()).max()
    return float(torch.maximum(mean, ((first[1] - second[1]).abs() / var).max()))


def record_inputs(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What every batch norm that is called once gets while the statistics of the batches normalize them."""
    inputs: dict[str, list[Tensor]] = {}
    copied = copy.deepcopy(model)
    bns = {name: module for name, module in copied.named_modules() if isinstance(module, _BatchNorm)}
    for name, bn in bns.items():
        bn.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].clone()))
    reestimate_bn_stats(copied, batches, len(batches))
    return {name: given for name, given in inputs.items() if len(given) == len(batches)}


def layer_deviation(model: nn.Module, inputs: dict[str, list[Tensor]]) -> tuple[float, float]:
    """The largest deviation of a batch norm alone, fed the same input in torch and in ONNX Runtime, and how far torch
    is there from itself in float64."""
    worst = (0.0, 0.0)
    for name, given in inputs.items():
        bn = copy.deepcopy(model.get_submodule(name))
        double = copy.deepcopy(bn).double()
        proto = bn_model(bn, given[0].dim())
        bnre_exp.onnx.reestimate_bn_stats(proto, given, len(given))
        reestimate_bn_stats(bn, given, len(given))
        reestimate_bn_stats(double, [x.double() for x in given], len(given))
        mean, var = (torch.tensor(numpy_helper.to_array(item)).double() for item in proto.graph.initializer[2:])
        wanted, precise = (statistics_of(nn.Sequential(module))["0"] for module in (bn, double))
        scale = precise[1].clamp_min(1e-12)
        worst = max(worst, (deviation((mean, var), wanted, scale), deviation(wanted, precise, scale)))
    return worst


def bn_model(bn: Any, ndim: int) -> onnx.ModelProto:
    """An ONNX model that is one batch norm."""
    ones, zeros = np.ones(bn.num_features, np.float32), np.zeros(bn.num_features, np.float32)
    tensors = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
    shape = ["N", bn.num_features, *(f"d{i}" for i in range(ndim - 2))]
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *tensors], ["y"], epsilon=bn.eps)], "bn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def check_qdq(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any]:
    """The folded network at w4a8 as ONNX: how much of its logits equals the simulation's, and what runs in integers."""
    sim = quantize(model, batches[2], QuantScheme(weight_bits=4, act_bits=8))
    with bypassed(sim):
        reestimate_bn_stats(sim, batches, len(batches))
    calibrate(sim, batches, len(batches))
    folded, _ = fold_batch_norms(sim)
    quantize_biases(folded)
    with tempfile.TemporaryDirectory() as folder:
        path, optimized = Path(folder) / "net.onnx", Path(folder) / "optimized.onnx"
        try:
            export_onnx(folded, batches[2], path)
        except UserError as error:
            return {"qdq": "refused", "error": str(error).partition("exported: ")[2]}
        session = open_session(onnx.load(path), optimized_to=optimized)
        kinds = [node.op_type for node in onnx.load(optimized).graph.node]
        got = session.run(None, feeds(session, batches[0]))
    with torch.no_grad():
        wanted = list(pieces.tensors_in(folded(batches[0])))
    equal = [torch.isclose(torch.from_numpy(a), b, rtol=1e-4, atol=1e-6).double().mean() for a, b in zip(got, wanted)]
    return {
        "qdq": "exported",
        "qdq_logits_equal": float(min(equal)),
        "integer_layers": sum(kinds.count(kind) for kind in INTEGER_KERNELS),
        "float_layers": sum(kinds.count(kind) for kind in LAYERS),
    }


def run(source: str, name: str) -> dict[str, Any]:
    """:func:`check`, whatever happens."""
    started, row = time.perf_counter(), {"name": name}
    try:
        row |= check(name)
    except Exception as error:  # whatever it is, it goes into the table
        row |= {
            "status": "refused" if isinstance(error, UserError) else "failed",
            "error": f"{type(error).__name__}: {error}"[:300],
        }
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def parameters(name: str) -> int:
    """How large a network is; the few that compute with their weights while they are built count as very large."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in zoo_network.build("torchvision", name)[0].parameters())
    except NotImplementedError:
        return 10**12


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return form.format(float(row[key])) if row.get(key) not in (None, "") else "–"

    lines = [
        "| network | input | BNs | ONNX against torch | torch's own rounding | each BN alone | its rounding | folded "
        "| kept | outputs after folding | layers in integer kernels at w4a8 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["status"] not in ("passed", "wrong"):
            continue
        layers = "–"
        if row.get("integer_layers") not in (None, ""):
            integer, floating = int(float(row["integer_layers"])), int(float(row["float_layers"]))
            layers = f"{integer} of {integer + floating}"
        cells = [
            row["name"], row["input"], row["bns"], number(row, "onnx_deviation", "{:.1e}"),
            number(row, "torch_deviation", "{:.1e}"), number(row, "layer_deviation", "{:.1e}"),
            number(row, "layer_rounding", "{:.1e}"), row["folded"], row["kept"],
            number(row, "fold_difference", "{:.1e}"), layers,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    others = [row for row in rows if row["status"] not in ("passed", "no BN") or row.get("qdq") == "refused"]
    if others:
        lines += ["", "Not passed, or not exported quantized:", ""]
        lines += [f"- {row['name']}: {row['status']}; {row.get('error') or ''}" for row in others]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 1 if a network is wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", nargs="+", default=["*"])
    parser.add_argument("--output", type=Path, default=Path("docs/zoo_onnx"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--memory", type=float, default=16, help="GiB for one network (default 16)")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    names = [n for n in zoo.names_of("torchvision") if any(fnmatch.fnmatchcase(n, p) for p in options.filter)]
    names.sort(key=parameters)  # what takes longest comes last
    file, known = options.output.with_suffix(".csv"), {}
    if file.exists() and not options.again:
        with file.open(newline="") as stream:
            known = {row["name"]: row for row in csv.DictReader(stream)}
    todo = [("torchvision", name) for name in names if name not in known]
    for row in zoo.results(todo, options.jobs, 1800, options.memory, run):
        print(row["name"], row.get("status"), row.get("error", ""), f"{row['seconds']} s", flush=True)
        known[row["name"]] = row
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(known.values())
    rows = [known[name] for name in sorted(known)]
    options.output.with_suffix(".md").write_text(markdown(rows))
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    sys.exit(main())
