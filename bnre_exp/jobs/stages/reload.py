"""Exported files, loaded anew in another process and evaluated there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.errors import UserError
from bnre_exp.jobs.stages.reload_process import describe_array, read_array, torch_settings
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.tasks.task import Evaluation


class Verifier:
    """A process of its own, :mod:`.reload_process`, that loads files; a context manager that ends it."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bnre_exp.jobs.stages.reload_process", json.dumps(torch_settings())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def evaluate(self, file: Mapping[str, Any], what: str) -> tuple[Evaluation, dict[str, float]]:
        """Top-1 of a file on the test data, and what else the process knows of it.

        file: what :mod:`.reload_process` loads. Raises ``UserError`` if it cannot be loaded or run there.
        """
        self._ask({"load": dict(file)}, what)
        setting = self._setting

        def predict(_: nn.Module, batch: Any) -> Tensor:
            return torch.from_numpy(self._predict(batch[0].contiguous().numpy(), what))

        description = f"{what}: evaluate"
        evaluation = evaluate(
            nn.Identity(), setting.loaders.test, predict, task=setting.task, progress=setting.progress,
            description=description,
        )  # fmt: skip
        return evaluation, self._ask({"describe": True}, what)

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        try:
            self._send(request)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]
            return answer
        except (OSError, ValueError) as error:
            raise self._failure(what) from error

    def _predict(self, x: np.ndarray, what: str) -> np.ndarray:
        try:
            self._send({"predict": describe_array(x)}, x.tobytes())
            answers: Any = self._process.stdout
            return read_array(json.loads(answers.readline()), answers)
        except (OSError, ValueError, EOFError) as error:
            raise self._failure(what) from error

    def _send(self, request: Mapping[str, Any], content: bytes = b"") -> None:
        pipe: Any = self._process.stdin
        pipe.write(json.dumps(request).encode() + b"\n" + content)
        pipe.flush()

    def _failure(self, what: str) -> UserError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.poll()
        self._process.kill()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        was_killed = code is None or code < 0  # what it last said is then not why
        reason = f"its process ended with status {code}" if was_killed or not lines else lines[-1]
        return UserError(f"the {what} that was written cannot be loaded and run in another process: {reason}")
