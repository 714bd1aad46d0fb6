"""Shared by the tests of jobs."""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from bnre_exp.jobs.stages import reload


class _Here:
    """A pool whose process is this one. What is sent and what comes back is pickled all the same."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, *sent: Any) -> Future[Any]:
        function, *arguments = pickle.loads(pickle.dumps(sent))
        future: Future[Any] = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None: ...


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported files are loaded again in this process: to start another takes longer than all that a small job does
    besides. That it is another one hold stages/test_reload.py and the jobs of test_run.py that leave every format."""
    monkeypatch.setattr(reload, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(reload, "_start", lambda pool: SimpleNamespace(kill=lambda: None))
