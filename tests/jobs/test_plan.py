"""What changes a stage's key, and what does not; and that a stage goes on alike from a file and from memory."""

from __future__ import annotations

import copy
import functools
import io
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import features
from rich.console import Console

from bnre_exp import UserError
from bnre_exp.cli.compose import compose_config
from bnre_exp.config import Config, ExportFormat
from bnre_exp.digests import digest
from bnre_exp.jobs import code_identity
from bnre_exp.jobs.plan import DATA_CODE, plan
from bnre_exp.jobs.prepare import open_store, prepare
from bnre_exp.jobs.run import run
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.stages.table import STAGES
from bnre_exp.tracking import open_run

NET = """
import functools, torch
from torch import nn
class Net(nn.Module):
    def __init__(self, act="relu", hidden=0.0):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.act = act
        self.register_buffer("seen", torch.full((8,), hidden), persistent=False)
    def forward(self, x):
        x = self.bn(self.conv(x))
        x = torch.relu(x) if self.act == "relu" else torch.nn.functional.silu(x)
        return self.head(x.mean((2, 3)) + self.seen)
partial = functools.partial(Net, act="relu")
def silu():
    return Net("silu")
from bnre_exp.tasks import Classification
class Other(Classification):
    pass
class Shown(Net):
    def extra_repr(self):
        return f"f={self.forward.__func__} {object()}"
class Extra(Net):
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass
class Random(torch.utils.data.Dataset):
    def __init__(self, train, root=None, shift=0):
        from bnre_exp.data import digits
        self.base, self.shift = digits(train), shift
        self.noise = torch.randint(0, 50, (1, 8, 8))
    def __len__(self):
        return 128
    def __getitem__(self, i):
        image, label = self.base[i]
        return ((image + self.noise + self.shift + torch.randint(0, 50, ())).clamp(0, 255)).to(torch.uint8), label
"""
SMALL = [
    "model=custom", "model._target_=plannet.Net", "dataset.train_limit=128", "dataset.test_limit=64",
    "dataset.batch_size=32", "train.epochs=2", "qat.epochs=1", "quant.calib_batches=1", "reest.num_batches=2",
    "tracking.enabled=false", "runtime.threads=1", "export=checkpoint",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("verified_here")


@contextmanager
def networks_in(folder: Path) -> Iterator[Path]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        (folder / "plannet.py").write_text(NET)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("plannet", None)
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    with networks_in(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The keys of the job as it is, in a folder of their own."""
    with networks_in(tmp_path_factory.mktemp("unchanged")) as folder:
        return keys(folder)


def keys_of(setting: Setting) -> dict[str, str]:
    return {planned.stage.name: digest(planned.depends) for planned in plan(setting)}


def setting_of(folder: Path, *overrides: str) -> Setting:
    config = compose_config([*SMALL, f"runtime.output_dir={folder}", *overrides])
    console = Console(file=io.StringIO())
    about = {"params": {}, "tags": {}, "output_dir": folder, "experiment": "t", "run_name": "t", "enabled": False}
    with open_run(folder / digest(overrides), **about) as log, open_store(config, 0) as store:
        job, _ = prepare(config, folder / "run", log, console, store, "t")
        return job.setting


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    return keys_of(setting_of(folder, *overrides))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A job that was prepared, with both kinds of files to export."""
    folder = tmp_path_factory.mktemp("known")
    setting = setting_of(folder, "model._target_=tests.jobs.nets.Residual")
    setting.config.export.formats.append(ExportFormat.onnx)
    return setting


@pytest.fixture(scope="module")
def known_keys(known):
    return keys_of(known)


EVERYTHING = ["fp32", "ptq", "qat_start", "qat", "reest", "fold", "export"]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("+model.kwargs.act=silu", "fp32"),
        ("model._target_=plannet.silu", "fp32"),
        ("+model.kwargs.hidden=0.5", "fp32"),
        ("seed=1", "fp32"),
        ("dataset.augment=true", "fp32"),
        ("dataset.batch_size=16", "fp32"),
        ("dataset.mean=[0.1]", "fp32"),
        ("train.epochs=3", "fp32"),
        ("train.lr=0.1", "fp32"),
        ("runtime.threads=2", "fp32"),
        ("runtime.precision=bfloat16", "fp32"),
        ("quant.weight_bits=3", "ptq"),
        ("quant.weight_grid=full", "ptq"),
        ("model.leaf_modules=[head]", "ptq"),
        ("quant.overrides=[{pattern:conv,weight_bits:8}]", "ptq"),
        ("qat.prepare=calibrate", "qat_start"),
        ("qat.prepare=reestimate", None),
        ("qat.lr=0.1", "qat"),
        ("qat.bn=frozen", "qat"),
        ("qat.freeze_bn_epoch=1", "qat"),
        ("qat.freeze_bn_epoch=2", None),  # there is one epoch
        ("qat.bn_momentum=0.05", "qat"),
        ("qat.validate=reestimated", "qat"),
        ("qat.validate=reestimated dataset.val_fraction=0", "fp32"),
        ("qat.validate_batches=3", None),
        ("qat.oscillation=freezing", "qat"),
        ("qat.oscillation_momentum=0.02", "qat"),
        ("qat.dampening=1", None),
        ("qat.freeze_to=0.02", None),
        ("qat.ema_decay=0.9", "qat"),
        ("reest.num_batches=3", "reest"),
        ("fold.bias_bits=null", "fold"),
        ("quant.percentile=99", None),
        ("reest.momentum=0.5", None),
        ("runtime.workers=1", None),
        ("fp32.min_top1=0.01", None),
        ("fp32.min_headline=0.01", None),
        ("task=custom task._target_=plannet.Other", "fp32"),
        ("tracking.run_name=other", None),
        ("store.max_gb=1", None),
        ("objective=fold/top1", None),
    ],
)
def test_a_setting_changes_the_stages_it_can_change_and_no_others(folder, unchanged, override, first):
    before, after = unchanged, keys(folder, *override.split(" "))
    changed = [stage for stage in EVERYTHING if before[stage] != after[stage]]
    assert changed == (EVERYTHING[EVERYTHING.index(first) :] if first else [])


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        ("qat.bn=frozen", "qat.freeze_bn_epoch=1", True),
        ("qat.bn=frozen", "qat.bn=frozen qat.bn_momentum=0.5 qat.freeze_bn_epoch=1", True),
        ("qat.oscillation=freezing", "qat.oscillation=freezing qat.dampening=1", True),
        ("qat.oscillation=freezing", "qat.oscillation=freezing qat.freeze_from=0.2", False),
        ("qat.oscillation=dampening", "qat.oscillation=dampening qat.dampening=1", False),
        ("qat.validate=reestimated", "qat.validate=reestimated qat.validate_batches=3", False),
        ("qat.epochs=3 qat.freeze_bn_epoch=2", "qat.epochs=3 qat.freeze_bn_epoch=3", False),
        ("dataset.val_fraction=0", "dataset.val_fraction=0 qat.validate=reestimated", True),
    ],
)
def test_of_the_control_of_qat_the_key_has_what_is_in_use(folder, one, other, are_alike):
    assert (keys(folder, *one.split())["qat"] == keys(folder, *other.split())["qat"]) is are_alike


# Each file is of the stages that run it, and each library of those that use it; what only words, reports or keeps
# results is of none.
CHANGES = [
    ("code", "config/sections.py", None),
    ("code", "errors.py", None),
    ("code", "report/plots.py", None),
    ("code", "jobs/run.py", None),
    ("code", "jobs/store.py", None),
    ("code", "tracking/runlog.py", None),
    ("code", "onnx/fold.py", None),
    ("code", "data/batches.py", "fp32"),
    ("code", "digests.py", "fp32"),
    ("code", "jobs/stages/outcome.py", "fp32"),
    ("code", "jobs/stages/network.py", "fp32"),
    ("code", "algorithms/train.py", "fp32"),
    ("code", "tasks/classification.py", "fp32"),
    ("code", "jobs/stages/ptq.py", "ptq"),
    ("code", "quantsim/placement.py", "ptq"),
    ("code", "quantsim/weights.py", "ptq"),
    ("code", "quantsim/quantizers/ranges.py", "ptq"),
    ("code", "algorithms/calibrate.py", "ptq"),
    ("code", "algorithms/bn_statistics.py", "qat_start"),
    ("code", "jobs/stages/qat.py", "qat"),
    ("code", "algorithms/control.py", "fp32"),
    ("code", "algorithms/oscillation.py", "qat"),
    ("code", "jobs/stages/reest_only.py", None),
    ("code", "jobs/stages/reest.py", "reest"),
    ("code", "algorithms/fold.py", "fold"),
    ("code", "algorithms/integers.py", "fold"),
    ("code", "export/checkpoint/save_load.py", "export"),
    ("code", "export/onnx/qdq.py", "export"),
    ("code", "onnx_io/session.py", "export"),
    ("library", "torch", "fp32"),
    ("library", "pillow", "fp32"),
    ("library", "onnxruntime", "export"),
    ("library", "onnx", "export"),
    ("library", "onnxscript", "export"),
    ("library", "onnx-ir", "export"),
    ("library", "mlflow", None),
    ("library", "timm", None),
]


@pytest.mark.parametrize(("kind", "name", "first"), CHANGES, ids=[name for _, name, _ in CHANGES])
def test_a_change_of_code_or_of_a_library_reaches_the_stages_that_use_it(
    known, known_keys, monkeypatch, kind, name, first
):
    before = known_keys
    if kind == "code":
        path, meaning = code_identity.ROOT / name, code_identity._meaning
        assert path.is_file()
        monkeypatch.setattr(code_identity, "_meaning", lambda file: "new" if file == path else meaning(file))
    else:
        version = code_identity._version
        monkeypatch.setattr(code_identity, "_version", lambda library: "0" if library == name else version(library))
    after = keys_of(known)
    changed = [stage for stage in EVERYTHING if before[stage] != after[stage]]
    assert changed == (EVERYTHING[EVERYTHING.index(first) :] if first else [])


def test_without_onnx_files_the_libraries_of_onnx_do_not_count(folder, monkeypatch):
    setting, version = setting_of(folder, "export=checkpoint"), code_identity._version
    before = keys_of(setting)
    monkeypatch.setattr(code_identity, "_version", lambda name: "0" if "onnx" in name else version(name))
    assert keys_of(setting) == before


def test_the_version_of_a_package_that_a_target_comes_from_counts(folder, monkeypatch):
    timm = ("model=timm", "model._target_=bnre_exp.models.timm_model", "model.name=mobilenetv3_small_050")
    setting, version = setting_of(folder, *timm), code_identity._version_of
    before = keys_of(setting)
    monkeypatch.setattr(code_identity, "_version_of", lambda top: "timm 0" if top == "timm" else version(top))
    after = keys_of(setting)
    assert all(before[stage] != after[stage] for stage in EVERYTHING)


# What stages import and no result depends on: it words, reports, keeps, or its results are in the key by value.
NEUTRAL = (
    "errors", "progress", "files", "targets", "config", "report", "tracking", "models", "data", "jobs.store",
    "jobs.reporting", "jobs.stages.given", "jobs.stages.snapshots",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_declares_all_that_it_imports(stage):
    def counts(name: str) -> bool:
        own = name.removeprefix("bnre_exp.")
        return own != name and not any(f"{own}.".startswith(f"{neutral}.") for neutral in NEUTRAL)

    names = (*stage.uses(compose_config(["export=all"])).code, *DATA_CODE)
    declared = {path for name in names for path in code_identity._files_of(name)}
    imported = code_identity._closure((f"bnre_exp.jobs.stages.{stage.name}",), counts)
    left = {name for name, path in imported.items() if path is not None and path not in declared}
    packages = ("jobs", "stages", "algorithms", "export", "quantsim", "tracing")
    assert not {name for name in left if not name.endswith(packages)}  # an __init__


def test_comments_docstrings_and_layout_are_no_code(tmp_path):
    def meaning(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return code_identity._meaning(path)

    plain = meaning("def f(x):\n    return x + 1\n")
    assert meaning('"""What."""\n\n\ndef f(x):  # why\n    """How."""\n\n    return (x\n            + 1)\n') == plain
    assert meaning("def f(x):\n    return x + 2\n") != plain
    assert meaning("def f(x):\n    'shown'; return x + 1\n") == plain
    assert meaning("def f(x):\n    return 'shown'\n") != meaning("def f(x):\n    return 'hidden'\n")


def test_the_same_in_another_process_folder_and_order(folder, unchanged):
    shown = [keys(folder, "model._target_=plannet.Shown") for _ in range(2)]
    assert shown[0] == shown[1]  # addresses of objects are no part of a structure
    assert keys(folder, "train.epochs=2", "seed=0") == keys(folder, "seed=0") == unchanged
    assert keys(folder, "train.epochs=0", "train.lr=0.3") == keys(folder, "train.epochs=0")


def test_torchs_global_settings_count(folder, unchanged):
    before = unchanged
    torch.backends.mkldnn.enabled = False
    try:
        assert keys(folder)["fp32"] != before["fp32"]
    finally:
        torch.backends.mkldnn.enabled = True
    torch.set_float32_matmul_precision("medium")
    try:
        assert keys(folder)["fp32"] != before["fp32"]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
        (torch.cpu, "get_capabilities", dict),
        (platform, "machine", lambda: "another"),
        (torch.version, "git_version", "another"),
        (features, "version", lambda feature: "another"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_processor_or_build_of_a_library_counts(known, monkeypatch, of, name, value):
    before = keys_of(known)
    monkeypatch.setattr(of, name, value, raising=False)
    assert keys_of(known)["fp32"] != before["fp32"]


def test_a_choice_of_kernels_by_the_environment_counts(known, monkeypatch):
    before = keys_of(known)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert keys_of(known)["fp32"] != before["fp32"]


def test_code_behind_a_partial_counts_and_an_edit_is_seen_by_new_processes_only(folder, caplog):
    before = keys(folder, "model._target_=plannet.partial")
    (folder / "plannet.py").write_text(NET + "\nx = 1\n")
    assert keys(folder, "model._target_=plannet.partial") == before  # this process runs what it imported
    assert "has changed since it was imported" in caplog.text
    for first in (code_identity._first_sha256, code_identity._meaning):  # as a new process would
        first.cache_clear()
    assert keys(folder, "model._target_=plannet.partial")["fp32"] != before["fp32"]


def test_a_network_that_cannot_be_told_from_others_takes_no_results_and_leaves_none(known, monkeypatch, caplog):
    before = keys_of(known)
    monkeypatch.setattr("bnre_exp.jobs.plan.network_identity", lambda *given: ("same", ["some.Lock", "some.Lock"]))
    several = [keys_of(known) for _ in range(2)]
    assert all(len({keys[stage] for keys in (before, *several)}) == 3 for stage in EVERYTHING)
    assert "cannot be told from its parts" in caplog.text and "holds some.Lock. " in caplog.text


NETWORK_OF_A_FILE = """
import json, pathlib, torch
from torch import nn
import torch.nn.functional as F
PLACE = pathlib.Path(__file__).with_name("slope.json")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.slope = json.loads(PLACE.read_text())
    def forward(self, x):
        return self.head(F.leaky_relu(self.bn(self.conv(x)), self.slope).mean((2, 3)))
class Read(Net):
    def forward(self, x):
        return self.head(F.leaky_relu(self.bn(self.conv(x)), json.loads(PLACE.read_text())).mean((2, 3)))
"""


@pytest.mark.parametrize("name", ["Net", "Read"])
def test_what_a_constructor_or_forward_reads_from_a_file_is_part_of_the_network(folder, name, monkeypatch):
    (folder / "slopenet.py").write_text(NETWORK_OF_A_FILE)
    overrides = ("model._target_=slopenet." + name, "train.epochs=1")
    try:
        (folder / "slope.json").write_text("0.01")
        first, _, _ = results(folder, "first", *overrides)
        assert results(folder, "again", *overrides)[0] == first
        computed = [path.stat().st_mtime_ns for path in sorted((folder / "store" / "entries").iterdir())]
        (folder / "slope.json").write_text("0.3")
        changed, truth = results(folder, "changed", *overrides), results(folder, "truth", "store.mode=off", *overrides)
        assert changed == truth and changed[0]["fp32/loss"] != first["fp32/loss"]
        assert len(list((folder / "store" / "entries").iterdir())) == 2 * len(computed)
    finally:
        sys.modules.pop("slopenet", None)


def test_a_state_that_no_file_can_hold_is_told_before_any_work(folder):
    with pytest.raises(UserError, match="keeps '_extra_state', a dict"):
        keys(folder, "model._target_=plannet.Extra")


@functools.cache
def composed(*overrides: str) -> Config:
    return compose_config([*SMALL, *overrides])


def results(folder: Path, name: str, *overrides: str):
    config = copy.deepcopy(composed(f"runtime.output_dir={folder}", *overrides))
    found = run(config, run_dir=folder / name, console=Console(file=io.StringIO()))
    metrics = {key: value for key, value in found.metrics.items() if "seconds" not in key}
    files = {path.name: path.read_bytes() for path in (folder / name / "folded").iterdir()}
    return metrics, files, (folder / name / "layers.md").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="QAT"),
        pytest.param(("qat.epochs=0",), id="PTQ", marks=pytest.mark.slow),
        pytest.param(("dataset._target_=plannet.Random", "dataset.in_memory=false"), id="random items"),
        pytest.param(("dataset._target_=plannet.Random", "qat.epochs=0"), id="random data in memory",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_stage_goes_on_alike_from_the_store_and_from_memory(folder, overrides):
    whole = results(folder, "off", "store.mode=off", *overrides)
    assert results(folder, "computed", *overrides) == whole
    assert results(folder, "reused", *overrides) == whole
    for stage in ("export", "fold", "reest", "qat", "ptq"):  # ever more is lost, and computed from what is left
        for entry in (folder / "store" / "entries").glob(f"{stage}-*"):
            (entry / "result.json").unlink()
        assert results(folder, f"without-{stage}", *overrides) == whole


def test_what_was_computed_from_another_network_is_not_taken(folder):
    whole = results(folder, "computed")
    (entry,) = (folder / "store" / "entries").glob("fp32-*")
    (entry / "result.json").unlink()
    assert results(folder, "again") == whole  # the same bits again, so that all that follows is reused
    record = json.loads((next((folder / "store" / "entries").glob("ptq-*")) / "entry.json").read_text())
    assert record["upstream"] == json.loads((entry / "entry.json").read_text())["files"]["state.safetensors"]["sha256"]
