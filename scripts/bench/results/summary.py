"""From what was measured to what the page needs: values over seeds, tests of what is compared, curves."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnre_exp.algorithms.significance import paired_test
from scripts.bench.results.cases import jobs

Key = tuple[str, int, str, str]  # network, seed, scheme, job
Side = tuple[str, str]  # job, row

AIMET = ("aimet", "aimet qat", "aimet qat prepared")  # its jobs

# What is compared on the same test images, by name: before, after.
COMPARED: Mapping[str, tuple[Side, Side]] = {
    "ptq": (("ptq", "recal_only"), ("ptq", "reest")),
    "ptq minmax": (("ptq minmax", "recal_only"), ("ptq minmax", "reest")),
    "qat": (("qat", "qat"), ("qat", "reest")),
    "qat beside re-estimation alone": (("qat", "reest_only"), ("qat", "reest")),
    "pooled": (("ptq", "reest"), ("ptq pooled", "reest")),
    "qat pooled": (("qat", "reest"), ("qat pooled", "reest")),
    "prior": (("ptq", "reest"), ("ptq prior", "reest")),
    "ptq tolerance": (("ptq", "reest"), ("ptq tolerance", "reest")),
    "qat tolerance": (("qat", "reest"), ("qat tolerance", "reest")),
    "ptq full grid": (("ptq", "reest"), ("ptq full grid", "reest")),
    "qat full grid": (("qat", "reest"), ("qat full grid", "reest")),
    "aimet": (("aimet", "reest"), ("ptq", "reest")),
    "aimet recalibrated": (("aimet", "recalibrated"), ("ptq", "reest")),
    "aimet minmax": (("aimet", "recalibrated"), ("ptq minmax", "reest")),
    "aimet qat": (("aimet qat", "reest"), ("qat none", "reest")),
    "aimet qat prepared": (("aimet qat prepared", "reest"), ("qat", "reest")),
}  # fmt: skip


def summary(measured: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """values: by network, scheme, job and row, of each seed; metrics: so, by job and metric; curves: by job and number
    of batches; tests: by what is compared. Only seeds of which a network and scheme was measured whole."""
    seeds = _whole(measured)
    found: dict[str, Any] = {"seeds": seeds, "values": {}, "seconds": {}, "metrics": {}, "curves": {}, "tests": {}}
    for (network, seed, scheme, job), one in measured.items():
        if seed not in seeds[network][scheme]:
            continue
        for row, value in one["rows"].items():
            _append(found["values"], value["value"], network, scheme, job, row)
            _append(found["seconds"], value["seconds"], network, scheme, job, row)
        for name, value in one["metrics"].items():
            _append(found["metrics"], value, network, scheme, job, name)
        for count, value in one["curve"].items():
            _append(found["curves"], value, network, scheme, job, count)
    for network, by_scheme in seeds.items():
        for scheme, some in by_scheme.items():
            for name, sides in COMPARED.items():
                for seed in some:
                    test = _test(measured, network, seed, scheme, sides)
                    _append(found["tests"], test, network, scheme, name)
    return found


def _whole(measured: Mapping[Key, Any]) -> dict[str, dict[str, list[int]]]:
    """By network and scheme, the seeds of which all is there."""
    seeds: dict[str, dict[str, list[int]]] = {}
    for network, seed, scheme in sorted({key[:3] for key in measured}):
        by_scheme = seeds.setdefault(network, {}).setdefault(scheme, [])
        if all((network, seed, scheme, job) in measured for job in (*jobs(scheme), *AIMET)):
            by_scheme.append(seed)
    return seeds


def _append(tree: dict[str, Any], value: Any, *path: str) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree.setdefault(path[-1], []).append(value)


def _test(
    measured: Mapping[Key, Any], network: str, seed: int, scheme: str, sides: tuple[Side, Side]
) -> dict[str, Any]:  # fmt: skip
    before, after = (_right(measured[network, seed, scheme, job]["rows"][row]) for job, row in sides)
    test = paired_test(before, after)
    return {"change": test.change, "low": test.low, "high": test.high, "p": test.p_value, "sure": test.is_sure}


def _right(row: Mapping[str, Any]) -> Tensor:
    """Of each test image, whether the network is right."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(row["right"]), np.uint8))
    return torch.from_numpy(bits[: row.get("images")].astype(np.float32))
