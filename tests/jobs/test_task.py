"""A task of a user's own, with another headline metric, goes through the whole runner; lower is better in it."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console

from bnre_exp import UserError
from bnre_exp.cli.compose import compose_config
from bnre_exp.cli.main import main
from bnre_exp.jobs.run import run
from bnre_exp.jobs.sweep import job_rows
from bnre_exp.tasks import Evaluation, Headline
from bnre_exp.tasks.build import build_task

CODE = '''
import torch
from torch import nn
from bnre_exp.tasks import Evaluation, Headline
from bnre_exp.tasks.task import first_input

class Net(nn.Module):
    """Tells how many a digit says, as a number."""
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 1)
    def forward(self, x):
        return {"number": self.head(self.body(x).mean((2, 3)))}

class HowMany:
    headline = Headline("mae", "mean error", higher_is_better=False)
    def feed(self, model, batch):
        return model(first_input(batch))
    def samples(self, batch):
        return len(batch[0])
    def loss(self, output, batch, label_smoothing=0.0):
        return (self.compared(output)[:, 0] - batch[1]).square().mean()
    def compared(self, output):
        return output["number"]
    def meter(self):
        return Meter(self)
    def agreement(self, first, second):
        return float(((first - second).abs() < 0.25).double().mean())
    def check_output(self, output, samples):
        assert self.compared(output).shape == (samples, 1)
    def check_labels(self, ranges):
        assert ranges["train"] == (0, 9)

class Meter:
    def __init__(self, task):
        self.task, self.found, self.errors = task, [], []
    def update(self, output, batch):
        found = self.task.compared(output)[:, 0].float().cpu()
        self.found.append(found)
        self.errors.append((found - batch[1].cpu()).abs())
    def compute(self):
        found, errors = torch.cat(self.found), torch.cat(self.errors)
        metrics = {"mae": float(errors.double().mean()), "worst": float(errors.max())}
        return Evaluation(metrics, HowMany.headline, len(found), found, -errors)

class Scaled(HowMany):
    def feed(self, model, batch):
        return {"number": 0.5 * model(first_input(batch))["number"]}

class Odd(HowMany):
    headline = Headline("mAP@.5", "mAP")

class Half:
    headline = Headline("mae", "mean error")
    def feed(self, model, batch):
        return model(batch)
'''
SMALL = [
    "model=custom", "model._target_=howmany.Net", "task=custom", "task._target_=howmany.HowMany",
    "dataset.train_limit=256", "dataset.test_limit=64", "dataset.batch_size=32", "train.epochs=2", "train.lr=0.01",
    "qat.epochs=1", "qat.lr=0.001", "reest.num_batches=4", "quant=w8a8", "quant.calib_batches=2",
    "export.min_agreement=0.9",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("verified_here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "howmany.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    sys.modules.pop("howmany", None)
    torch.set_num_threads(threads)


def job(folder, *overrides: str, name: str = "run"):
    config = compose_config([*SMALL, f"runtime.output_dir={folder}", "tracking.enabled=false", *overrides])
    console = Console(record=True, width=160, file=io.StringIO())
    return run(config, run_dir=folder / name, overrides=overrides, console=console), console.export_text()


def test_all_stages_go_by_the_task(folder):
    results, said = job(folder, "export=all")
    metrics = results.metrics
    stages = ("fp32", "ptq", "qat", "reest", "fold", "export", "encodings", "onnx")
    assert all(f"{stage}/{name}" in metrics for stage in stages for name in ("mae", "worst", "seconds"))
    more = ("reest/delta_mae", "fold/mae_agreement", "fold/val_mae", "fold/bias_delta_mae", "qat/val_mae",
            "onnx/mae_agreement", "encodings/mae_agreement", "fold/max_abs_logit_diff", "fp32/train_loss")  # fmt: skip
    assert all(name in metrics for name in more)
    assert not [name for name in metrics if "top1" in name or name.endswith("/loss")]
    assert metrics["reest/delta_mae"] == metrics["reest/mae"] - metrics["qat/mae"]
    assert metrics["fold/mae"] < 4 and metrics["onnx/mae_agreement"] >= 0.9
    assert "FP32: mean error" in said and "validation mean error" in said and "┃ mean error ┃" in said
    report = (folder / "run" / "report.md").read_text()
    assert "| stage | mean error | change | seconds | |" in report and "top-1" not in report
    again, _ = job(folder, "export=all", name="again")  # every stage from the store, every number exactly
    assert {k: v for k, v in again.metrics.items() if "seconds" not in k} == {
        k: v for k, v in metrics.items() if "seconds" not in k
    }
    assert (folder / "again" / "model.onnx").read_bytes() == (folder / "run" / "model.onnx").read_bytes()


def test_worse_means_higher_where_lower_is_better(folder):
    with pytest.raises(UserError, match=r"fp32/mae=.* is worse than fp32.min_headline=0.001"):
        job(folder, "fp32.min_headline=0.001", "export=checkpoint")
    job(folder, "fp32.min_headline=100", "export=checkpoint", name="other")


def test_a_sweep_is_compared_by_the_task(folder, monkeypatch, capsys):
    arguments = [*SMALL, "export=checkpoint", f"runtime.output_dir={folder / 'out'}", "tracking.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["bnre_exp", "-m", *arguments, "quant.weight_bits=4,8"])
    assert main() == 0
    (sweep,) = (folder / "out" / "multirun").iterdir()
    rows = job_rows(sweep)
    assert [row.headline.name for row in rows] == ["mae", "mae"]
    best = min(row.metrics["fold/mae"] for row in rows)
    table = (sweep / "comparison.md").read_text()
    assert f"**{best:.4f}**" in table and (sweep / "mae_by_bits.png").exists() and not list(sweep.glob("top1*"))
    said = capsys.readouterr().out
    assert "re-estimated" in said and "top-1" not in said


def test_what_is_no_task_is_told_with_what_is_missing(folder):
    with pytest.raises(UserError, match="task._target_=howmany.Half gives a Half without samples, loss, meter"):
        build_task("howmany.Half")
    with pytest.raises(UserError, match="task._target_=howmany.Nothing"):
        build_task("howmany.Nothing")
    with pytest.raises(UserError, match="task.kwargs"):
        build_task("howmany.HowMany", {"classes": 3})
    with pytest.raises(UserError, match="is called 'mAP@.5'"):
        build_task("howmany.Odd")


@pytest.mark.parametrize("quirk", ["'metrics': {'mse': 1.0}", "'scores': torch.zeros(3)"])
def test_what_a_task_measures_must_fit(folder, quirk):
    values = {
        "metrics": {"mae": torch.tensor(0.5)},
        "count": 2,
        "predictions": torch.zeros(2),
        "scores": torch.zeros(2),
    }
    headline = Headline("mae", "mean error")
    assert type(Evaluation(**values, headline=headline).mae) is float
    with pytest.raises(UserError, match="not its headline 'mae'|2 predictions and 3 scores for 2 samples"):
        Evaluation(**{**values, **eval("{" + quirk + "}")}, headline=headline)


def test_files_are_fed_as_the_task_feeds(folder):
    """The output of the network is a dict, and the task scales it; the files give the same."""
    results, _ = job(folder, "task._target_=howmany.Scaled", "export.min_agreement=1", "train.epochs=1")
    assert results.metrics["onnx/mae_agreement"] == 1 and results.metrics["export/mae"] == results.metrics["fold/mae"]
