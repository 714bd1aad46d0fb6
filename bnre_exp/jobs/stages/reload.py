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
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from bnre_exp.algorithms.feeding import evaluation_mode
from bnre_exp.errors import UserError
from bnre_exp.jobs.stages import reload_process
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.quantsim.whole import with_parts
from bnre_exp.tasks.task import Evaluation


class Verifier:
    """A process of its own, :mod:`.reload_process`, that loads files; a context manager that ends it.

    network: the folded one. Its graphs are computed by the files, in that process; what is around them here.
    """

    def __init__(self, setting: Setting, network: nn.Module) -> None:
        self._setting, self._network = setting, network
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), reload_process.start, (reload_process.torch_settings(),)
        )
        self._process = _start(self._pool)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # whatever it does: its work is done, or nobody waits for it any more
        self._pool.shutdown()

    def evaluate(self, files: Mapping[str, Mapping[str, Any]], what: str) -> tuple[Evaluation, dict[str, float]]:
        """What files give on the test data, and what else the process knows of them.

        files: what :mod:`.reload_process` loads, by the name of the part; under the empty name the whole network.
        Raises ``UserError`` if they cannot be loaded or run there.
        """
        self._ask(what, reload_process.load, {part: dict(file) for part, file in files.items()})
        if isinstance(self._network, fx.GraphModule):
            network: nn.Module = self._elsewhere("", self._network, what)
        else:
            network = with_parts(self._network, lambda part, graph: self._elsewhere(part, graph, what))
        evaluation = self._setting.evaluate(network, f"{what}: evaluate", as_shipped=True)
        return evaluation, self._ask(what, reload_process.describe)

    def _elsewhere(self, part: str, graph: nn.Module, what: str) -> nn.Module:
        def predict(*inputs: Tensor) -> list[Tensor]:
            arrays = [x.detach().cpu().contiguous().numpy() for x in inputs]
            outputs = self._ask(what, reload_process.predict, part, arrays)
            return [torch.from_numpy(output).to(inputs[0].device) for output in outputs]

        return _Elsewhere(predict, graph, what)

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
    """A graph that is computed by a function, so that a task can feed it like any other. The form of its outputs is
    that of the graph's own, which is computed once."""

    def __init__(self, predict: Callable[..., list[Tensor]], graph: nn.Module, what: str) -> None:
        super().__init__()
        self._predict, self._graph, self._what = predict, [graph], what  # no submodule: it has no state of its own
        self._structure: Any = None

    def forward(self, *inputs: Tensor) -> Any:
        if self._structure is None:
            with evaluation_mode(self._graph[0]), torch.no_grad():
                self._structure = tree_structure(self._graph[0](*inputs))
        outputs = self._predict(*inputs)
        if len(outputs) != self._structure.num_leaves:
            expected = f"expected {self._structure.num_leaves}"
            raise UserError(f"the {self._what} that was written has {len(outputs)} outputs; {expected}")
        return tree_unflatten(outputs, self._structure)


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
