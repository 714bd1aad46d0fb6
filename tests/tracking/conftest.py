"""Shared by the tests of tracking."""

from __future__ import annotations

import pytest

from bnre_exp.tracking import open_run


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """A database with all tables, made once: migrations take seconds."""
    folder = tmp_path_factory.mktemp("migrated")
    with open_run(folder / "run", params={}, tags={}, output_dir=folder, experiment="other", run_name="first"):
        pass
    return folder / "mlflow.db"
