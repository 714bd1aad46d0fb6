#!/usr/bin/env python
"""What the steps of re-estimation and of QAT cost, beside the float network and other libraries: seconds and memory.

    python scripts/bench/steps.py                                # all networks and shapes; some 20 minutes on two cores
    python scripts/bench/steps.py --quick --network resnet18     # a try
    python scripts/bench/steps.py --device cuda --compile --precision bfloat16

Writes OUTPUT.md, OUTPUT.json and pictures in the folder images beside them; --render makes the page and the pictures
again from OUTPUT.json. What is measured, and how, is told by the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from scripts.bench.speed import contenders, page, peers, pictures, scaling  # noqa: E402
from scripts.bench.speed.case import Case  # noqa: E402
from scripts.bench.speed.contenders import Variant  # noqa: E402
from scripts.bench.speed.machine import machine  # noqa: E402
from scripts.bench.speed.measure import (  # noqa: E402
    QUICK,
    Make,
    Rounds,
    Row,
    can_measure_memory,
    median,
    peaks,
    timings,
)

NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
SHAPES = ("32x128", "224x16")
PLAIN = Variant()


def variants(compiled: bool, precisions: Sequence[str]) -> list[Variant]:
    """All that is asked for beside the plain one."""
    both = [Variant(is_compiled, precision) for precision in ("float32", *precisions)
            for is_compiled in ((False, True) if compiled else (False,))]  # fmt: skip
    return [variant for variant in dict.fromkeys(both) if variant != PLAIN]


def all_makes(more: Sequence[Variant]) -> dict[str, Make]:
    """Every contender by the name of its column."""
    makes: dict[str, Make] = {
        "FP32": partial(contenders.fp32, variant=PLAIN),
        "ours": partial(contenders.ours, variant=PLAIN),
        "ours, weights only": partial(contenders.ours_weights_only, variant=PLAIN),
        "AIMET": peers.aimet,
        "AIMET, channels-last": peers.aimet_channels_last,
        "Brevitas": peers.brevitas,
        "update_bn": peers.torch_update_bn,
        "fvcore": peers.fvcore,
    }
    for variant in more:
        makes[variant.label("FP32")] = partial(contenders.fp32, variant=variant)
        makes[variant.label("ours")] = partial(contenders.ours, variant=variant)
    return makes


def chosen(makes: dict[str, Make], names: Sequence[str], missing: dict[str, str]) -> dict[str, Make]:
    """Those asked for (all, if none is), without what needs a library that is missing."""
    wanted = [name for name in makes if name in names or not names]
    return {name: makes[name] for name in wanted if name.partition(",")[0] not in missing}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that is asked for, as JSON: what there is of it after every case, and all at the end."""
    more = variants(options.compile, options.precision)
    missing = peers.missing(options.contender or all_makes(more))
    makes = chosen(all_makes(more), options.contender, missing)
    gc.freeze()  # what the libraries made at import is not looked through again and again
    cases = [
        Case(network, *shape, options.weight_bits, options.act_bits, options.device, timed(options, shape[0]))
        for shape in options.shape
        for network in options.network
    ]
    notes, memory = contenders.not_offered(more), {}
    if options.memory and can_measure_memory(options.device):
        for case in cases:  # first, while this process has computed nothing
            _say(f"{case.name}: peak memory")
            memory[case] = list(peaks(case, makes, options.jobs))
    else:
        notes.append("Peak memory was not measured.")
    results: dict[str, Any] = {
        "command": options.command, "is_quick": options.quick, "machine": machine(options.device),
        "missing": missing, "contenders": list(makes), "notes": notes, "cases": [], "scaling": [],
    }  # fmt: skip
    rounds = QUICK if options.quick else Rounds(options.seconds)
    for case in cases:
        torch.compiler.reset()  # or what was compiled for another shape is compiled for every shape now
        rows: list[Row] = []
        for row in timings(case, makes, rounds):
            rows.append(row)
            _say(f"{case.name}: {row['step']}, {row['contender']}: {row.get('error') or f'{median(row):.3f} s'}")
        known = {"name": case.name, **case.as_json()}
        results["cases"].append({**known, "timings": rows, "memory": memory.get(case, [])})
        yield results
    if options.scaling:
        for row in scaling.series(cases[0], QUICK if options.quick else Rounds(options.seconds / 5, most=7)):
            results["scaling"].append(row)
            _say(f"by {row['along']}, {row['at']}: {row['step']}, {row['contender']}: "
                 f"{row.get('error') or f'{median(row):.3f} s'}")  # fmt: skip
    yield results


def render(results: dict[str, Any], output: Path) -> None:
    """OUTPUT.md and its pictures."""
    images = output.parent / "images"
    bars, growth = images / f"{output.name}.png", images / f"{output.name}_scaling.png"
    pictures.bars(results, bars)
    if results["scaling"]:
        pictures.growth(results["scaling"], growth)
    shown = f"images/{growth.name}" if results["scaling"] else None
    output.with_suffix(".md").write_text(page.markdown(results, f"images/{bars.name}", shown))


def timed(options: argparse.Namespace, size: int) -> int:
    """Batches that are timed in a call: one where they take long."""
    return 1 if options.quick or size > 64 else 2


def _say(text: str) -> None:
    print(text, flush=True)


def _shape(text: str) -> tuple[int, int]:
    size, _, batch = text.partition("x")
    return int(size), int(batch)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "of torchvision, timm/NAME, NAME*WIDTH or MODULE:FUNCTION; default: " + " ".join(NETWORKS)
    shapes = [_shape(text) for text in SHAPES]
    parser.add_argument("--network", nargs="+", default=NETWORKS, metavar="NAME", help=names)
    parser.add_argument("--shape", nargs="+", type=_shape, default=shapes, metavar="PIXELSxBATCH", help="default: "
                        + " ".join(SHAPES))  # fmt: skip
    parser.add_argument("--contender", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(all_makes([]))}")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--compile", action="store_true", help="compiled as well")
    parser.add_argument("--precision", nargs="+", default=[], choices=("bfloat16",), help="in bfloat16 as well")
    parser.add_argument("--seconds", type=float, default=Rounds.seconds, help="of a step of all (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, one batch")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes at a time for memory (default %(default)s); slow where waiting threads spin",
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--render", action="store_true", help="measure nothing: the page again from OUTPUT.json")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    unknown = set(options.contender) - set(all_makes(variants(options.compile, options.precision)))
    if unknown:
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    options.command = shlex.join(["python", "scripts/bench/steps.py", *arguments])
    return options


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    table = options.output.with_suffix(".json")
    if options.render:
        render(json.loads(table.read_text()), options.output)
        return 0
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    table.parent.mkdir(parents=True, exist_ok=True)
    for results in measure(options):
        table.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        render(results, options.output)
    _say(f"{table}, {options.output.with_suffix('.md')} and {options.output.parent / 'images'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
