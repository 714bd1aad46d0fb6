"""A saved network to damage."""

from __future__ import annotations

import shutil

import pytest

from bnre_exp.export.checkpoint.save_load import save_folded
from tests.export.saving import IMAGES, folded_network
from tests.networks import flat_cnn


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net"
    save_folded(folded_network(flat_cnn(), IMAGES), path)
    return path


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")
