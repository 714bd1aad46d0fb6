"""``python -m bnre_exp.onnx reestimate|fold in.onnx out.onnx``: the batch norms of ONNX models on the command line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from bnre_exp.algorithms.bn_statistics import METHODS
from bnre_exp.errors import UserError, counted
from bnre_exp.onnx.command_data import batches_of
from bnre_exp.onnx.compare import compare_outputs, random_batches
from bnre_exp.onnx.fold import fold_batch_norms
from bnre_exp.onnx.reestimate import reestimate_bn_stats
from bnre_exp.onnx_io.files import load_model, save_model
from bnre_exp.report.console import ConsoleProgress

# How much outputs may differ after folding, relative to the largest: float rounding, or codes beyond a tie.
LARGEST_FLOAT, LARGEST_QUANTIZED = 1e-3, 0.2
DATA_HELP = """training data: an .npy file [images, C, H, W] or an .npz file with an array for each input, preprocessed
as the model takes it; a folder of images; or digits, fashion_mnist, cifar10 or cifar100"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a mistake (one line on stderr), 130 if interrupted."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        _check(options)
        _reestimate(options, console) if options.command == "reestimate" else _fold(options, console)
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was written.\n")
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ``UserError`` for numbers out of range, and for options that the data have no use for."""
    bounds = [
        ("--batch-size", options.batch_size, 1),
        ("--seed", options.seed, 0),
        ("--image-size", options.image_size, 1),
    ]
    for name, value, least in bounds:
        if value is not None and value < least:
            raise UserError(f"{name} {value}: expected at least {least}.")
    if options.std and not all(value > 0 for value in options.std):
        raise UserError(f"--std {options.std}: expected numbers above 0.")
    if not 0 < getattr(options, "momentum", 1) <= 1:
        raise UserError(f"--momentum {options.momentum}: expected a number above 0, at most 1.")
    for_images = [f"--{name}" for name in ("mean", "std", "image-size") if getattr(options, name.replace("-", "_"))]
    if for_images and str(options.data).endswith((".npy", ".npz")):
        raise UserError(f"{', '.join(for_images)}: arrays are taken as they are; preprocess them before.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bnre-exp-onnx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reestimate = commands.add_parser("reestimate", help="new BN statistics from training data")
    fold = commands.add_parser("fold", help="batch norms into the layers before them")
    for command in (reestimate, fold):
        command.add_argument("input", metavar="in.onnx")
        command.add_argument("output", metavar="out.onnx")
        command.add_argument("--data", required=command is reestimate, help=DATA_HELP)
        command.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (64)")
        command.add_argument(
            "--image-size", type=int, metavar="PIXELS", help="of image data; default: as the model says"
        )
        command.add_argument(
            "--mean", type=float, nargs="+", help="of pixels in [0, 1], per channel; default: the data's"
        )
        command.add_argument(
            "--std", type=float, nargs="+", help="of pixels in [0, 1], per channel; default: the data's"
        )
        command.add_argument("--seed", type=int, default=0, help="of the order of the images (0)")
    reestimate.add_argument("--num-batches", type=int, default=100, metavar="N", help="batches to use (100)")
    reestimate.add_argument("--method", choices=METHODS, default=METHODS[0])
    reestimate.add_argument("--momentum", type=float, default=0.1, help="weight of the newest batch, for ema (0.1)")
    return parser


def _reestimate(options: argparse.Namespace, console: Console) -> None:
    model = load_model(options.input)
    batches = batches_of(model, options)
    started = time.perf_counter()
    handle = reestimate_bn_stats(
        model, batches, options.num_batches, method=options.method, momentum=options.momentum,
        progress=ConsoleProgress(console),
    )  # fmt: skip
    save_model(model, options.output)
    passes = counted(handle.loader_passes, "pass", "passes")
    _say(
        console,
        f"{len(handle.reestimated)} batch norms re-estimated from {handle.num_batches} batches of {options.batch_size} "
        f"({passes} over the data) in {time.perf_counter() - started:.1f} s",
    )
    _list(console, "not re-estimated", handle.skipped)
    _say(console, f"written: {options.output}")


def _fold(options: argparse.Namespace, console: Console) -> None:
    model = load_model(options.input)
    folded, report = fold_batch_norms(model)
    batches = batches_of(model, options) if options.data else random_batches(model)
    difference = None if batches is None else compare_outputs(model, folded, batches)
    limit = LARGEST_QUANTIZED if any("QuantizeLinear" in node.op_type for node in model.graph.node) else LARGEST_FLOAT
    if difference is not None and not difference <= limit:
        raise UserError(
            f"Folding changes the model: its outputs differ by {difference:.1e} of the largest, more than {limit:g}. "
            "Nothing was written. This is a defect of bnre_exp; please report it with the model."
        )
    save_model(folded, options.output)
    _say(console, f"{len(report.folded)} batch norms folded, {len(report.kept)} kept")
    _list(console, "kept", report.kept)
    _list(console, "note", report.notes)
    if difference is None:
        _say(console, "not compared: the model cannot be run on random input; give --data")
    else:
        kind = "the data" if options.data else "random input"
        _say(console, f"outputs on {kind} differ by at most {difference:.1e} of the largest")
    _say(console, f"written: {options.output}")


def _list(console: Console, heading: str, rows: Sequence[tuple[str, str]]) -> None:
    """``(name, reason)`` rows, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in rows:
        names.setdefault(reason, []).append(name)
    for reason, those in names.items():
        more = f" and {len(those) - 5} more" if len(those) > 5 else ""
        _say(console, f"{heading}: {', '.join(those[:5])}{more}: {reason}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
