"""Do two ONNX models compute the same?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Optional

import numpy as np
import onnx

from bnre_exp.ort.session import KINDS, feeds, open_session

COMPARED = 4  # batches


def compare_outputs(
    first: onnx.ModelProto, second: onnx.ModelProto, batches: Optional[Iterable[Any]]
) -> Optional[float]:
    """The largest difference of an output on the first batches, divided by that output's largest magnitude in
    ``first``; None without batches.

    Raises ``UserError`` if ONNX Runtime does not take a model, or the batches do not fit.
    """
    sessions = open_session(first), open_session(second)
    if batches is None:
        return None
    worst = 0.0
    for batch in itertools.islice(batches, COMPARED):
        a, b = (session.run(None, feeds(session, batch)) for session in sessions)
        for x, y in zip(a, b):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            largest = np.abs(x).max(initial=0.0)
            worst = max(worst, float(np.abs(x - y).max(initial=0.0) / (largest or 1.0)))
    return worst


def random_batches(model: onnx.ModelProto, size: int = 2, seed: int = 0) -> Optional[list[dict[str, np.ndarray]]]:
    """One batch of normal numbers for a model whose inputs have known shapes but for the batch, else None."""
    generator = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {}
    for item in open_session(model).get_inputs():
        shape = [size if i == 0 and type(n) is not int else n for i, n in enumerate(item.shape)]
        if not all(type(n) is int for n in shape) or item.type not in KINDS:
            return None
        batch[item.name] = np.asarray(generator.standard_normal(shape)).astype(KINDS[item.type])
    return [batch]
