"""Which interrupted run or sweep a command goes on with."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from bnre_exp.cli.compose import config_folder, container_of, identity_of, own_part, section_of, typed
from bnre_exp.cli.config_files import refuse_unchosen
from bnre_exp.cli.job import cores, is_grid
from bnre_exp.config import RuntimeConfig, TrackingConfig
from bnre_exp.credentials import take_credentials
from bnre_exp.digests import digest
from bnre_exp.jobs import folders


@dataclass(frozen=True)
class Ahead:
    """What Hydra is about to do. composed: the configuration without what is swept; folder: an interrupted one to go
    on with, None for a new one; added: overrides that take credentials out of what config files say."""

    composed: DictConfig
    overrides: Sequence[str]
    is_multirun: bool
    identity: str
    tracking: TrackingConfig
    runtime: RuntimeConfig
    folder: Path | None
    jobs_at_once: int
    added: Sequence[str]


def look_ahead(arguments: Any) -> Ahead | None:
    """Compose as Hydra will, to find the folder to go on with; None where Hydra itself should say what is wrong."""
    main_folder = os.path.abspath(arguments.config_path or str(config_folder()))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=main_folder):
        written = OverridesParser.create().parse_overrides(list(arguments.overrides))
        fixed = [override.input_line for override in written if not override.is_sweep_override()]
        is_swept = len(fixed) != len(written)
        if arguments.config_dir:
            fixed.append(f"hydra.searchpath=['file://{os.path.abspath(arguments.config_dir)}']")
        name = arguments.config_name or "config"
        try:
            composed = hydra.compose(name, overrides=[str(o) for o in fixed], return_hydra_config=True)
        except MissingConfigException:
            if arguments.config_name or arguments.config_path:  # Hydra may know where it is
                return None
            raise
    refuse_unchosen(composed.hydra.runtime.choices)
    is_multirun = bool(arguments.multirun) or composed.hydra.mode is RunMode.MULTIRUN
    if not is_multirun and is_swept:
        return None
    tracking, runtime = section_of(composed, "tracking", TrackingConfig), section_of(composed, "runtime", RuntimeConfig)
    if not is_multirun:  # a mistake is told before torch is imported; in a multirun, what is swept may mend it
        typed(own_part(composed))
    added = _take_credentials(tracking)
    identity, output = identity_of(composed), Path(runtime.output_dir)
    if is_multirun:
        swept = [o for o in written if not o.key_or_group.startswith(("hydra/launcher", "hydra.launcher"))]
        typed_in = sorted(str(o.input_line) for o in swept)
        identity = digest([identity, typed_in, container_of(composed.hydra.sweeper)])
    may_go_on = (not is_multirun or is_grid(composed.hydra)) and not is_folder_chosen(arguments)
    parent = output / ("multirun" if is_multirun else "runs")
    folder = folders.find_unfinished(parent, identity) if may_go_on else None
    _close_dead(output, folder)
    at_once = _jobs_at_once(composed.hydra, written) if is_multirun else 1
    return Ahead(composed, list(arguments.overrides), is_multirun, identity, tracking, runtime, folder, at_once, added)


def _take_credentials(tracking: TrackingConfig) -> list[str]:
    """Credentials that tracking.uri has from a config file or the environment go where MLflow looks for them; the
    override after which Hydra does not write them down."""
    before = tracking.uri
    tracking.uri = take_credentials(before) if before else before
    return [f"tracking.uri='{tracking.uri}'"] if tracking.uri != before else []


def _jobs_at_once(info: DictConfig, written: Sequence[Any]) -> int:
    """How many jobs the launcher runs on this machine at the same time, 1 where it does not run them here."""
    target, sweeper = str(info.launcher.get("_target_", "")), info.sweeper
    if not target.endswith(("JoblibLauncher", "LocalLauncher")):
        return 1
    params = [f"{key}={value}" for key, value in dict(sweeper.get("params") or {}).items()]
    swept = {o.get_key_element(): o for o in [*OverridesParser.create().parse_overrides(params), *written]}
    jobs = int(sweeper.get("n_jobs") or 1)
    if is_grid(info):
        jobs = math.prod(len(list(o.sweep_string_iterator())) for o in swept.values() if o.is_discrete_sweep())
        jobs = min(jobs, int(sweeper.get("max_batch_size") or jobs))
    if target.endswith("JoblibLauncher"):
        wanted = int(info.launcher.get("n_jobs") or 1)
        jobs = min(jobs, wanted if wanted > 0 else max(1, cores() + 1 + wanted))
    return max(1, jobs)


def is_folder_chosen(arguments: Any) -> bool:
    """Whether the user says where the job or sweep goes."""
    return any(str(o).lstrip("+").startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for o in arguments.overrides)


def _close_dead(output: Path, spared: Path | None) -> None:
    """Runs that were killed and that this command does not go on with are closed; their own command may reopen them."""
    multirun = output / "multirun"
    sweeps = [path for path in multirun.iterdir() if path.is_dir()] if multirun.is_dir() else []
    dead = folders.find_abandoned([output / "runs", multirun, *sweeps])
    dead = [folder for folder in dead if spared is None or (folder != spared and folder.parent != spared)]
    if dead:
        from bnre_exp.jobs.sweep import close_if_dead  # late: it imports MLflow's file

        for folder in dead:
            close_if_dead(folder)
