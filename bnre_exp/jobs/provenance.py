"""Who ran what, and where to look at it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_tags(folder: Path) -> dict[str, str]:
    """Commit, and whether tracked files differ from it, of the checkout that ``folder`` is in; empty outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower(), "mlflow.source.git.commit": commit}
