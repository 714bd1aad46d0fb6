"""Do two ONNX models compute the same?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx

from bnre_exp.errors import UserError
from bnre_exp.onnx_io.session import KINDS, feeds, open_session, run_session

COMPARED = 4  # batches


def compare_outputs(first: onnx.ModelProto, second: onnx.ModelProto, batches: Iterable[Any]) -> float:
    """The largest difference of an output on the first batches, divided by that output's largest magnitude in
    ``first``; infinite where only one of them is finite.

    Raises ``UserError`` if ONNX Runtime does not take or run a model, the batches do not fit, or no output of ``first``
    is finite, so that the comparison would say nothing.
    """
    sessions = open_session(first), open_session(second)
    worst, is_told = 0.0, False
    for batch in itertools.islice(batches, COMPARED):
        a, b = (run_session(session, feeds(session, batch)) for session in sessions)
        for x, y in zip(a, b):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            finite = np.isfinite(x)
            is_told = is_told or bool(finite.any())
            if not np.array_equal(finite, np.isfinite(y)):
                return math.inf
            largest = np.abs(x[finite]).max(initial=0.0)
            worst = max(worst, float(np.abs(x - y)[finite].max(initial=0.0) / (largest or 1.0)))
    if not is_told:
        raise UserError("The model's outputs are not finite, so that it cannot be told whether folding changes them.")
    return worst


def random_batches(model: onnx.ModelProto, seed: int = 0) -> list[dict[str, np.ndarray]] | None:
    """One batch of normal numbers that the model can run on, None where its inputs' shapes do not tell."""
    session = open_session(model)
    for size in (2, 1):
        generator = np.random.default_rng(seed)
        batch: dict[str, np.ndarray] = {}
        for item in session.get_inputs():
            shape = [size if i == 0 and type(n) is not int else n for i, n in enumerate(item.shape)]
            if not shape or not all(type(n) is int for n in shape) or item.type not in KINDS:
                return None
            batch[item.name] = np.asarray(generator.standard_normal(shape)).astype(KINDS[item.type])
        try:
            run_session(session, feeds(session, batch))
            return [batch]
        except UserError:
            continue
    return None
