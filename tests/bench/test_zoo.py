"""Real networks from float to folded checkpoint, and the script that does that to a whole zoo."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bnre_exp.quantsim.sim import graphs_of
from scripts.bench.zoo import zoo as zoo_script
from scripts.bench.zoo import zoo_network
from scripts.bench.zoo.foldable import foldable_bns
from scripts.bench.zoo.zoo_network import packages
from tests.networks import Net

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "zoo" / "zoo.py"
X = torch.randn(3, 4, 6, 6)
PARTS = ("body", "head")

FAST = ["torchvision/shufflenet_v2_x0_5", "timm/tf_mobilenetv3_small_minimal_100"]
SLOW = [
    "torchvision/googlenet", "torchvision/ssdlite320_mobilenet_v3_large_backbone",
    "timm/mobilenetv3_small_050", "timm/levit_128s", "timm/mobilevit_xxs",
    "torchvision/lraspp_mobilenet_v3_large", "torchvision/fasterrcnn_resnet50_fpn_backbone",
    "timm/resnest14d", "timm/ghostnet_050", "timm/efficientvit_m0",
    "torchvision_detection/fasterrcnn_mobilenet_v3_large_320_fpn", "torchvision_detection/fcos_resnet50_fpn",
]  # fmt: skip


@pytest.mark.parametrize("network", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_networks_that_people_have(network):
    row = zoo_network.run(*network.split("/"))
    assert row["status"] == "passed", row.get("error")
    assert row["folded"] + row["kept"] == row["bns"] > 0 and row["folded"] > 0 and row["weights"] > 0


def test_the_check_sees_a_wrong_fold(monkeypatch):
    right = zoo_network.fold_batch_norms

    def wrong(sim):
        folded, report = right(sim)
        with torch.no_grad():
            folded.get_submodule(report.folded[3][0]).bias[0] += 1e-4
        return folded, report

    monkeypatch.setattr(zoo_network, "fold_batch_norms", wrong)
    row = zoo_network.run("timm", "mobilenetv3_small_050")
    assert row["status"] == "wrong" and "folding changes" in row["error"]


@pytest.mark.slow
def test_the_check_sees_a_bn_that_could_have_been_folded(monkeypatch):
    right = zoo_network.fold_batch_norms

    def lazy(sim):
        target = next(node for node in sim.graph.nodes if node.target == "conv_stem")
        sim.get_submodule(target.target).register_forward_hook(lambda *_: None)
        return right(sim)

    monkeypatch.setattr(zoo_network, "fold_batch_norms", lazy)
    row = zoo_network.run("timm", "mobilenetv3_small_050")
    assert row["status"] == "wrong" and "did not fold ['bn1']" in row["error"]


class Chooser(nn.Module):
    """Chooses by values between its parts, as detectors do, and takes images and how many of them to answer for."""

    def __init__(self, outside=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = Head()
        self.last = nn.BatchNorm1d(4) if outside else nn.Identity()

    def forward(self, x, count):
        found = self.body(x)
        best = found.sum(dim=(2, 3)).argmax(dim=1)
        return self.last(self.head([found, found[torch.arange(len(x)), best][:, None]]))[: count.max().item()]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(7, 4, 1), nn.BatchNorm2d(4)

    def forward(self, maps):
        return self.bn(self.conv(torch.cat(maps, dim=1))).mean(dim=(2, 3))


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.abs().sum() > 0 else x


def run_own(monkeypatch, build, inputs, parts=()):
    monkeypatch.setitem(packages.SOURCES, "own", (lambda: ["net"], lambda _: packages.Built(build(), [inputs], parts)))
    return zoo_network.run("own", "net")


def images_and_counts(size):
    return torch.randn(size, 3, 8, 8), torch.full((size,), size)


def test_a_network_in_parts_is_a_row_of_all_its_parts(monkeypatch):
    row = run_own(monkeypatch, Chooser, images_and_counts, PARTS)
    assert row["status"] == "passed", row.get("error")
    assert (row["bns"], row["folded"], row["weights"], row["input"]) == (2, 2, 2, "3×8×8")


@pytest.mark.parametrize("layer", ["body.0", "head.conv"])
def test_the_check_sees_a_wrong_fold_in_every_part(monkeypatch, layer):
    right = zoo_network.fold_batch_norms

    def wrong(sim):
        folded, report = right(sim)
        part, _, name = layer.partition(".")
        with torch.no_grad():
            graphs_of(folded)[part].get_submodule(name).bias[0] += 1e-3
        return folded, report

    monkeypatch.setattr(zoo_network, "fold_batch_norms", wrong)
    row = run_own(monkeypatch, Chooser, images_and_counts, PARTS)
    assert row["status"] == "wrong" and "folding changes" in row["error"]


def test_a_bn_in_no_part_is_told(monkeypatch):
    row = run_own(monkeypatch, lambda: Chooser(outside=True), images_and_counts, PARTS)
    assert row["status"] == "wrong" and row["error"] == "of 3 BNs 2 are folded and 0 are kept"


def test_a_network_of_which_nothing_folds_has_all_figures(monkeypatch):
    row = run_own(monkeypatch, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (3, 8, 8))
    assert (row["status"], row["folded"], row["kept"]) == ("passed", 0, 1), row.get("error")
    assert "| 1 | 0 | 1 |" in zoo_script.markdown([row], "zoo.py")


def test_what_a_refusal_advises_is_tried(monkeypatch):
    def build():
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pooled, Deciding())

    row = run_own(monkeypatch, build, (3, 8, 8))
    assert row["status"] == "refused" and "depends on the values of tensors" in row["error"]
    assert row["error"].endswith("(Tried: leaf_modules=['3']: passed, 1 of 1 BNs folded.)")


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda m, x: m.bn(m.conv(x)), "after"),
        (lambda m, x: m.bn(m.conv(x)).relu() * m.conv.weight.mean(), ""),
        (lambda m, x: m.bn(y := m.conv(x)) + y, ""),
        (lambda m, x: m.bn(m.conv(x).relu()), ""),
        (lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), "after"),
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), ""),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), ""),
        (lambda m, x: m.bn(m.conv(x).reshape(*x.shape)), "after through"),
        (lambda m, x: m.bn(m.conv(x).transpose(0, 1)[:, :1].expand(4, 4, 6, 6)), ""),
        (lambda m, x: m.depthwise(m.bn(x)), "before"),
        (lambda m, x: m.padded(m.bn(x)), ""),
        (lambda m, x: m.bn(x), ""),
    ],
)
def test_the_independent_count(forward, found):
    modules = {"conv": nn.Conv2d(4, 4, 1), "other": nn.Conv2d(4, 4, 1, bias=False), "bn": nn.BatchNorm2d(4)}
    modules |= {name: nn.Conv2d(4, 4, 3, groups=4, padding=p) for name, p in (("depthwise", 0), ("padded", 1))}
    counted = foldable_bns(Net(forward, **modules), X)
    kinds = {kind for kind in ("after", "through", "before") if getattr(counted, kind) == {"bn"}}
    assert kinds == set(found.split())


def zoo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--output", str(tmp_path / "zoo")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def rows(tmp_path: Path) -> dict[str, dict[str, str]]:
    with (tmp_path / "zoo.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_script_writes_a_table_and_goes_on_where_it_was(tmp_path):
    done = zoo(tmp_path, "--source", "torchvision", "--filter", "mnasnet0_5", "alexnet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: row["status"] for name, row in rows(tmp_path).items()} == {"mnasnet0_5": "passed", "alexnet": "no BN"}
    page = (tmp_path / "zoo.md").read_text()
    assert "| mnasnet0_5 | 2.2 M | 3×64×64 | 53 (0) |" in page and "torchvision: 1 of 1 networks with BN pass" in page
    assert "not in the table: alexnet" in page and "Not passed" not in page
    before = rows(tmp_path)
    again = zoo(tmp_path, "--source", "torchvision", "--filter", "mnasnet0_5", "mobilenet_v3_small")
    assert again.returncode == 0 and "mobilenet_v3_small" in again.stdout and "passed   mnasnet" not in again.stdout
    assert rows(tmp_path).keys() == {"alexnet", "mnasnet0_5", "mobilenet_v3_small"}
    assert rows(tmp_path)["mnasnet0_5"] == before["mnasnet0_5"]
    assert "| mnasnet0_5 | 2.2 M |" in (tmp_path / "zoo.md").read_text()


@pytest.mark.slow
def test_a_network_that_takes_too_long_or_too_much_is_named(tmp_path):
    late = zoo(tmp_path, "--source", "torchvision", "--filter", "resnet152", "--timeout", "1")
    assert late.returncode == 1 and "took more than 1 s" in rows(tmp_path)["resnet152"]["error"]
    large = zoo(tmp_path, "--source", "torchvision", "--filter", "vgg11_bn", "--memory", "0.7")
    assert large.returncode == 1 and rows(tmp_path)["vgg11_bn"]["status"] == "failed"
    page = (tmp_path / "zoo.md").read_text()
    assert "## Not passed" in page and "torchvision: 0 of 2 networks with BN pass" in page


def test_a_pattern_that_matches_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT))["main"](["--filter", "resnet999*"])
    assert stop.value.code == 2 and "no network matches resnet999*" in capsys.readouterr().err
