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

from scripts.bench.zoo import zoo_network
from scripts.bench.zoo.foldable import foldable_bns
from tests.networks import Net

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "zoo" / "zoo.py"
X = torch.randn(3, 4, 6, 6)

FAST = ["torchvision/shufflenet_v2_x0_5", "timm/tf_mobilenetv3_small_minimal_100"]
SLOW = [
    "torchvision/googlenet", "torchvision/ssdlite320_mobilenet_v3_large_backbone",
    "timm/mobilenetv3_small_050", "timm/levit_128s", "timm/mobilevit_xxs",
    "torchvision/lraspp_mobilenet_v3_large", "torchvision/fasterrcnn_resnet50_fpn_backbone",
    "timm/resnest14d", "timm/ghostnet_050", "timm/efficientvit_m0",
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
