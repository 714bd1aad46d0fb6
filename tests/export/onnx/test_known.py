"""Networks that need no export to be known to export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bnre_exp import QuantScheme, quantize
from bnre_exp.export.onnx.known import is_known_to_export
from bnre_exp.export.onnx.model import check_exportable, try_export

X = torch.randn(2, 3, 16, 16)


class Block(nn.Module):
    """A residual network of what is known."""

    def __init__(self, **conv: object) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, **conv), nn.BatchNorm2d(6), nn.ReLU6(), nn.MaxPool2d(2)
        )
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.second(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def sim_of(model: nn.Module, **scheme: object):
    return quantize(model, X, QuantScheme(**{"weight_bits": 4, "act_bits": 8, "weight_range": "minmax", **scheme}))


@pytest.mark.parametrize(("per_channel", "opset"), [(True, 13), pytest.param(False, 23, marks=pytest.mark.slow)])
def test_what_is_known_to_export_does(per_channel, opset):
    sim = sim_of(Block(), per_channel=per_channel)
    assert is_known_to_export(sim, X, opset)
    try_export(sim, X, opset)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_usual_networks_are_known(name, monkeypatch):
    sim = sim_of(getattr(torchvision.models, name)(num_classes=10))
    monkeypatch.setattr("bnre_exp.export.onnx.model.try_export", None)  # must not be called
    check_exportable(sim, X, 21)


@pytest.mark.parametrize(
    ("model", "scheme", "opset"),
    [
        (Block(padding_mode="circular"), {}, 21),
        (Block(), {"act_bits": 16}, 13),
        (Block(), {"weight_bits": 9}, 13),
        (Block(), {}, 12),
        (Block().double(), {}, 21),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU()), {}, 21),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), {}, 21),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3)), {}, 21),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, ceil_mode=True)), {}, 21),
    ],
    ids=["circular", "16 bits", "9 bits", "opset", "double", "operation", "bn first", "pooling", "ceil"],
)
def test_anything_else_is_tried(model, scheme, opset):
    example = X.double() if next(model.parameters()).dtype == torch.float64 else X
    sim = quantize(model, example, QuantScheme(**{"weight_bits": 4, "act_bits": 8, **scheme}))
    assert not is_known_to_export(sim, example, opset)
