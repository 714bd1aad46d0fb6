"""What README and docs show works: every command and example is run, and every internal link leads somewhere.

Bash takes the commands of a page apart, one after the other, in a folder that holds what a reader would have
(write_files). Ours are run each in a process of its own, most in a fork of one that has imported the libraries; bash
runs the others. What cannot be run here is in CANNOT_RUN; SMALL is what is appended to shorten long trainings.
Fashion-MNIST is a small stand-in, so that these commands run on every machine.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import bnre_exp
from bnre_exp.cli.compose import compose_config
from tests.test_packaging import entry_points, write_commands

ROOT = Path(bnre_exp.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands, by how they begin, that no test can run, and why.
CANNOT_RUN = {
    "scripts/test": "it runs this test",
    "source .venv/bin/activate": "the environment is that of the tests",
    "pip install": "tests install nothing",
    "mlflow models predict": "a server's command, with an id that only the reader knows",
}
# Run in other words. The script of a checkout would make an environment first; ID is what the reader sees in MLflow.
IN_OTHER_WORDS = {
    "scripts/run": "bnre-exp",
    ".venv/bin/python": "python",
    "--sweep ID": '--sweep "$(ls -d outputs/multirun/* | tail -1)"',
}
# Of three and more values that a sweep takes, the first and the last are run.
MANY = r"=([\w.]+),(?:[\w.]+,)+([\w.]+)"
# Appended to commands that match, so that they take seconds. Agreement on 32 images comes in steps of 3 %.
JOB = r"bnre-exp (?!--|.*--cfg)"
MOBILENET = "(mobilenet_v2|experiment=(ptq|bits|batches|per_channel))"
SMALL = {
    JOB: "dataset.train_limit=64 dataset.test_limit=32 dataset.batch_size=16 quant.calib_batches=1 "
    "export.min_agreement=0.9",
    rf"{JOB}(?!.*model.checkpoint)": "train.epochs=1",
    rf"{JOB}(?!.*(qat=off|experiment=(ptq|bits|batches|per_channel)))": "qat.epochs=1",
    # MobileNetV2 of three blocks, and a small network for ResNet18, which the main job of .ci/run trains
    rf"{JOB}.*{MOBILENET}": "model.kwargs.width_mult=0.25 "
    "'model.kwargs.inverted_residual_setting=[[1,16,1,1],[6,24,2,2]]'",
    rf"{JOB}(?!.*(model=(custom|timm|onnx|ultralytics|torchvision_.*)|{MOBILENET}))": "model._target_=small.Small",
    rf"{JOB}.*dataset=image_folder": "model.kwargs.num_classes=2",
    # ONNX too where it is shown, where it is the source, of another task, and of the main job
    rf"{JOB}(?!$|.*(export|model=onnx|task=custom))": "export=checkpoint",
    r"bnre-exp .*optuna": "hydra.sweeper.n_trials=2",
    r"bnre-exp .*experiment=(bits|batches|per_channel)": "hydra.mode=RUN",  # ptq is run as the sweep it is
    r"bnre-exp .*experiment=smoke": "dataset.train_limit=128",
    r"python .*steps.py": "--quick --network resnet18 --shape 8x4 --contender FP32 ours --no-scaling --output tried",
    r"python .*zoo.py": "--filter mobilenetv3_small_050 --output zoo",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The command lines of a page, continued ones joined, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)# .*|\s{2,}#.*", "", line).strip() for line in lines) if line]


def runnable(page: Path) -> list[str]:
    return [line for line in commands(page) if not line.startswith(tuple(CANNOT_RUN))]


def not_shown_earlier(page: Path) -> list[str]:
    """Those that no earlier page shows too."""
    earlier = {command for before in PAGES[: PAGES.index(page)] for command in commands(before)}
    return [command for command in runnable(page) if command not in earlier]


def as_run(command: str) -> str:
    """A command as it is run here."""
    for shown, instead in IN_OTHER_WORDS.items():
        command = command.replace(shown, instead)
    command = re.sub(MANY, r"=\1,\2", command)
    more = [text for pattern, text in SMALL.items() if re.match(pattern, command + " ")]
    return " ".join([command, *more])


def overrides(command: str) -> list[str]:
    """Of a job's command, without Hydra's own; of a sweep the first value of each."""
    words = [word for word in shlex.split(command)[1:] if not word.startswith(("-", "hydra")) and word != "job"]
    parsed = OverridesParser.create().parse_overrides(words)
    first = [next(iter(o.sweep_string_iterator())) if o.is_sweep_override() else None for o in parsed]
    return [w if value is None else f"{w.partition('=')[0]}={value}" for w, value in zip(words, first)]


# What a reader has in the working directory


class Small(nn.Module):
    """With a layer4, as ResNet18 has one."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.Linear(8, num_classes)
        self.layer4 = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.layer4(x)).mean((2, 3)))


def write_files(folder: Path) -> None:
    """Modules that pages show, an ONNX model, arrays, a checkpoint, images, and Fashion-MNIST's stand-in."""
    for page in PAGES:
        for text in blocks(page, "python"):
            named = re.match(r"# (\w+\.py)\n", text)
            if named:
                (folder / named[1]).write_text(text)
    torch.onnx.export(
        Small().eval(), (torch.randn(2, 3, 32, 32),), folder / "in.onnx", dynamo=True, optimize=False, verbose=False,
        external_data=False, input_names=["x"], dynamic_shapes=({0: torch.export.Dim("n")},),
    )  # fmt: skip
    (folder / "net.onnx").write_bytes((folder / "in.onnx").read_bytes())
    rng = np.random.default_rng(0)
    np.save(folder / "batches.npy", rng.normal(size=(128, 3, 32, 32)).astype(np.float32))
    (folder / "small.py").write_text("import torch\nfrom torch import nn\n\n\n" + inspect.getsource(Small))
    save_file(Small().state_dict(), folder / "fp32.safetensors")
    own = runpy.run_path(str(folder / "mynet.py"))["MyNet"](10)
    torch.save(own.state_dict(), folder / "mynet.pth")
    for index in range(48):
        place = folder / "images" / ("val" if index % 3 == 0 else "train") / ("cat" if index % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(place / f"{index}.png")
    raw = folder / "cache" / "bnre_exp" / "datasets" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 300), ("t10k", 100)):
        images, labels = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    write_files(place)
    write_commands(place / "bin")
    return place


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


# Tests


def test_pages_are_read_as_they_are_meant() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert "scripts/run" in every and "bnre-exp-store prune --older-than 30" in every and len(every) > 40
    assert any("choice(2,3,4,8)" in command and "n_trials" in command for command in every)


@pytest.mark.parametrize("entry", [*CANNOT_RUN, *IN_OTHER_WORDS])
def test_the_tables_hold_nothing_that_is_not_shown(entry: str) -> None:
    assert any(entry in command for page in PAGES for command in commands(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_shown_composes(page: Path) -> None:
    for command in not_shown_earlier(page):
        if command.startswith(("bnre-exp ", "scripts/run ")):
            compose_config(overrides(command))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:scripts|bnre_exp|docs|tests|conf)/[\w/.]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_examples_of_the_library(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # a page's modules import each other
    for name in [path.stem for path in folder.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test's
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))) for _ in range(3)]
    model, example_input = Small(), batches[0][0]
    sim = bnre_exp.quantize(model, example_input, bnre_exp.QuantScheme(weight_bits=4, act_bits=8, per_channel=True))
    bnre_exp.calibrate(sim, batches, num_batches=2)
    folded, _ = bnre_exp.fold_batch_norms(sim)
    bnre_exp.quantize_biases(folded)
    bnre_exp.save_folded(folded, "folded")
    known: dict[str, Any] = {"model": model, "example_input": example_input, "folded": folded, "batches": batches}
    known |= {"loader": batches, "test_loader": batches, "__name__": "example"}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), known)


# Commands as they are shown

WARM = ["bnre_exp.cli.main", "bnre_exp.jobs.run", "bnre_exp.onnx.__main__", "mlflow", "matplotlib.pyplot"]


def run_ours(words: Sequence[str], folder: Path, environment: Mapping[str, str], said: Path) -> None:
    """One of our commands, in a process that ends with it."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(folder / "bin" / words[0]), *words[1:]]
    sys.exit(pkgutil.resolve_name(entry_points()[words[0]])())


Run = Callable[[str, Path, Mapping[str, str]], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a command in a folder; gives its exit status and what it said."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(WARM)

    def run(command: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
        bash: dict[str, Any] = {"cwd": folder, "env": {**os.environ, **environment}, "text": True}
        # A launcher's own processes end with the interpreter; a fork would wait for joblib's, which linger for minutes.
        if command.split()[0] not in entry_points() or re.search("[|&;]|hydra/launcher", command):
            done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **bash)
            return done.returncode, done.stdout
        taken_apart = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"], **bash)
        words, said = taken_apart.split("\0")[:-1], folder / "said.txt"
        process = processes.Process(target=run_ours, args=(words, folder, environment, said))
        process.start()
        process.join()
        return process.exitcode or 0, said.read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_commands(page: Path, folder: Path, run: Run) -> None:
    """Those of a page in its order; one that an earlier page shows too is run there."""
    search = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        "PATH": os.pathsep.join(search), "PYTHONPATH": str(ROOT),
        "BNRE_OUTPUT_DIR": str(folder / "outputs"), "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    failed = []
    for command in map(as_run, not_shown_earlier(page)):
        status, said = run(command, folder, environment)
        failed += [f"$ {command}\n{said[-4000:]}"] if status else []
    assert not failed, "\n\n".join(failed)
