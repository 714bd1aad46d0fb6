"""A job counts the classes of its data: the network, the task, the keys and the record of its data have that number."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from bnre_exp.cli.compose import compose_config
from bnre_exp.digests import digest
from bnre_exp.errors import UserError
from bnre_exp.jobs.plan import plan
from bnre_exp.jobs.prepare import open_store, prepare
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.tracking import open_run

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, classes)
    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
def unlisted(train, root=None):
    return [(torch.full((1, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(24)]
"""
SMALL = ["runtime.threads=1", "dataset.image_size=32", "dataset.batch_size=8", "export=checkpoint", "qat=off"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("L", (8, 8), 20 * index).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "countnet.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    threads = torch.get_num_threads()
    yield tmp_path
    sys.modules.pop("countnet", None)
    torch.set_num_threads(threads)


def setting_of(folder: Path, *overrides: str) -> Setting:
    config = compose_config([*SMALL, f"runtime.output_dir={folder}", *overrides])
    about = {"params": {}, "tags": {}, "output_dir": folder, "experiment": "t", "run_name": "t", "enabled": False}
    with open_run(folder / digest(overrides), **about) as log, open_store(config, 0) as store:
        job, _ = prepare(config, folder / "run", log, Console(file=io.StringIO()), store, "t")
        return job.setting


def keys(setting: Setting) -> dict[str, str]:
    return {planned.stage.name: digest(planned.depends) for planned in plan(setting)}


def test_three_class_folders_give_a_network_of_three_classes(folder: Path) -> None:
    images = ["dataset=image_folder", f"dataset.root={folder}", "dataset.val_fraction=0"]
    setting = setting_of(folder, *images)
    known = keys(setting)
    assert setting.built.module(setting.example()).shape == (2, 3)
    assert setting.config.dataset.num_classes == setting.task.num_classes == 3
    profiles = [path.read_text() for path in folder.glob("*/metrics.jsonl")]
    assert any('"classes\\": 3' in text or '"classes": 3' in text for text in profiles)
    assert keys(setting_of(folder, *images, "dataset.num_classes=3")) == known
    with pytest.raises(UserError, match=r"num_classes=10, but dataset\.root=.* has class folders ant, bee, cow"):
        setting_of(folder, *images, "dataset.num_classes=10")


def test_a_dataset_that_lists_nothing_is_counted_as_it_is_read(folder: Path) -> None:
    own = ["dataset._target_=countnet.unlisted", "model=custom", "model._target_=countnet.Net"]
    setting = setting_of(folder, *own)
    assert setting.config.dataset.num_classes == setting.task.num_classes == 3
    with pytest.raises(UserError, match="gives 5 classes where the dataset has 3"):
        setting_of(folder, *own, "+model.kwargs.classes=5")
    with pytest.raises(UserError, match=r"dataset\.num_classes is not set, and the network's last layer needs it"):
        setting_of(folder, own[0])
