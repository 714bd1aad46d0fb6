"""Exported files, loaded anew in another process and evaluated there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from bnre_exp.errors import UserError
from bnre_exp.jobs.stages import reload_process
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.tasks.task import Evaluation


class Verifier:
    """A process of its own, :mod:`.reload_process`, that loads files; a context manager that ends it.

    like: an output of the network, which tells how the outputs of files are to be taken apart.
    """

    def __init__(self, setting: Setting, like: Any = None) -> None:
        self._setting, self._structure = setting, tree_structure(like)
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), reload_process.start, (reload_process.torch_settings(),)
        )
        self._process = _start(self._pool)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # whatever it does: its work is done, or nobody waits for it any more
        self._pool.shutdown()

    def evaluate(self, file: Mapping[str, Any], what: str) -> tuple[Evaluation, dict[str, float]]:
        """What a file gives on the test data, and what else the process knows of it.

        file: what :mod:`.reload_process` loads. Raises ``UserError`` if it cannot be loaded or run there.
        """
        self._ask(what, reload_process.load, dict(file))
        setting = self._setting

        def predict(x: Tensor) -> Any:
            outputs = self._ask(what, reload_process.predict, x.contiguous().numpy())
            if len(outputs) != self._structure.num_leaves:
                expected = f"expected {self._structure.num_leaves}"
                raise UserError(f"the {what} that was written has {len(outputs)} outputs; {expected}")
            return tree_unflatten([torch.from_numpy(output) for output in outputs], self._structure)

        evaluation = setting.evaluate(_Elsewhere(predict), f"{what}: evaluate", as_shipped=True)
        return evaluation, self._ask(what, reload_process.describe)

    def _ask(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(reload_process.in_words, function, *arguments).result()
        except (UserError, BrokenProcessPool) as error:
            reason = str(error) if isinstance(error, UserError) else self._end()
            raise UserError(
                f"the {what} that was written cannot be loaded and run in another process: {reason}"
            ) from error

    def _end(self) -> str:
        """How the process ended."""
        self._pool.shutdown()
        code = self._process.exitcode or 0
        return f"its process ended with status {code}" + (f", {signal.strsignal(-code)}" if code < 0 else "")


class _Elsewhere(nn.Module):
    """A network that is computed by a function, so that a task can feed it like any other."""

    def __init__(self, predict: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._predict = predict

    def forward(self, x: Tensor) -> Any:
        return self._predict(x)


def _start(pool: ProcessPoolExecutor) -> BaseProcess:
    """Start the pool's one process now, so that it gets ready while this one goes on."""
    others, own = set(multiprocessing.active_children()), vars(multiprocessing.current_process())["_config"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for good in the child: Ctrl-C is the parent's
    method, is_daemon = multiprocessing.get_start_method(allow_none=True), own.get("daemon", False)
    multiprocessing.set_start_method("spawn", force=True)  # the child is told it; joblib's own it would not know
    own["daemon"] = False  # joblib's may be daemons, which have no children, for fear that these outlive them
    # The child would import the main module again: a script that runs jobs would run them there, in it, without end.
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        pool.submit(os.getpid)
    finally:
        sys.modules["__main__"] = script
        own["daemon"] = is_daemon
        multiprocessing.set_start_method(method, force=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    (process,) = set(multiprocessing.active_children()) - others
    return process
