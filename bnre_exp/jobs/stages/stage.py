"""What a stage of a job is: the record of which the table of stages is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnre_exp.config import Config
from bnre_exp.jobs.reporting import Job
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.network import Form, Result
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.setting import Setting

Settings = dict[str, Any]  # by the name that the user types


@dataclass(frozen=True)
class Uses:
    """What a stage's result depends on, besides settings and the stage before it.

    code: files and folders of this package, as dotted paths below ``bnre_exp``; libraries: distributions, of which the
    version counts.
    """

    code: tuple[str, ...]
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage.

    section: of the configuration, that it reads. settings: from those to the ones that it depends on: what has no
    effect is left out, and what it reads elsewhere is added. run: from what is given to what it measured, and its
    network. follows: the stages that may be before it, the nearest first; of these the first that is on is before it.
    form: how its network is kept. uses: what its result depends on. rows: what it measures, by the name in metrics,
    and the heading of that in comparisons. is_on: whether a job has it. off: what the report says where it is off,
    ``(what, why)``. leave: what else is to be done once it is reported, whether it was computed or found.
    """

    name: str
    section: str
    run: Callable[[Setting, Given], tuple[Outcome, nn.Module]]
    follows: tuple[str, ...]
    form: Form
    uses: Callable[[Config], Uses]
    rows: Mapping[str, str]
    settings: Callable[[Setting, Settings], Settings] = lambda setting, own: own
    is_on: Callable[[Config], bool] = lambda config: True
    off: tuple[str, str] | None = None
    leave: Callable[[Job, Result], None] | None = None
