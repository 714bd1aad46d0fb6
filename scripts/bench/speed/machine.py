"""Where figures were taken: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "torchvision", "aimet-torch", "brevitas", "fvcore")


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on, as JSON."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def sentence(found: dict[str, Any]) -> str:
    """The same in words."""
    place = f"{found['gpu']}, beside a {found['cpu']}" if found["gpu"] else found["cpu"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{place} ({found['cores']} cores, {found['threads']} threads of torch, OMP_WAIT_POLICY="
        f"{found['OMP_WAIT_POLICY']}; {found['system']}); {versions}; {found['date']}, commit {found['commit']}; "
        f"the load of the machine was {found['load before']} before"
    )


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return ", ".join([model, *numbers])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bnre_exp", "scripts")
        return git("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
