"""A checkpoint takes no more time and memory to load than its size explains, whatever numbers are in it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnre_exp
from bnre_exp import UserError
from bnre_exp.export.checkpoint.allowed import module_classes
from bnre_exp.export.checkpoint.module_json import build_module
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
from bnre_exp.quantsim.tracing.trace import trace
from tests.export.saving import IMAGES, assert_same, edit, folded_network, refused
from tests.networks import flat_cnn

X = {"node": "input_1"}
HUGE = 10**11
CODES = "0.parametrizations.weight.original"
LIMITED = """
import resource, sys
import torch
from tests.export.checkpoint import test_bounds
for kind, value in ((resource.RLIMIT_CPU, 60), (resource.RLIMIT_AS, 12 * 2**30)):
    resource.setrlimit(kind, (value, value))
getattr(test_bounds, sys.argv[1])()
print("done")
"""


def limited(function: str) -> None:
    """Run a function of this file in a process with so much time and memory that an attack that works ends it."""
    root = str(Path(bnre_exp.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, function]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "done", (done.returncode, done.stderr[-2000:])


def module(**changes):
    return lambda document: document["modules"]["2"].update(changes)


def codes(**changes):
    return lambda document: document["modules"]["0"]["codes"]["weight"].update(changes)


def call(target, *args, op="call_function", **kwargs):
    node = {"name": "extra", "op": op, "target": target, "args": list(args), "kwargs": kwargs}
    return lambda document: document["graph"].insert(1, node)


def quantizer(**changes):
    return lambda document: document["modules"]["act_quantizers.input_1"]["args"].update(changes)


def lstm(layers):
    return module(type="torch.nn.LSTM", args={"input_size": 1, "hidden_size": 1, "num_layers": layers})


def transformer(**layers):
    return module(type="torch.nn.Transformer", args={"d_model": 4, "nhead": 1, "dim_feedforward": 4, **layers})


ATTACKS = {
    "bits of an activation": (quantizer(bits=HUGE), "bits=100000000000, expected 2 to 32"),
    "bits as a float": (quantizer(bits=8.0), "bits=8.0"),
    "bits of a weight": (codes(bits=HUGE), "bits=100000000000, expected 2 to 32"),
    "no bits": (codes(bits=0), "bits=0"),
    "channels of codes": (codes(transposed=True, in_channels=HUGE), "do not fit"),
    "groups of codes": (codes(transposed=True, groups=HUGE), "do not fit"),
    "axes of codes": (codes(ndim=HUGE), "do not fit"),
    "layers of an LSTM": (lstm(10**8), "layers=100000000 is more than the 0 tensors"),
    "encoder layers": (transformer(num_encoder_layers=10**8), "layers=100000000 is more than the 0 tensors"),
    "decoder layers": (transformer(num_decoder_layers=10**8), "layers=100000000 is more than the 0 tensors"),
    "memory of a device": (
        module(type="torch.nn.Linear", args={"in_features": 10**6, "out_features": 10**6, "device": {"device": "cpu"}}),
        "is given a device",
    ),
    "memory of a layer": (
        module(type="torch.nn.Linear", args={"in_features": 10**6, "out_features": 10**6}),
        "cannot be built",
    ),
    "size of a layer": (module(type="torch.nn.Upsample", args={"size": 10**9}), "Upsample is asked for 1e\\+09"),
    "factorial": (call("math.factorial", 10**7), "math.factorial' is not on the list"),
    "factorial of a size": (call("math.factorial", X), "math.factorial' is not on the list"),
    "binomial": (call("math.comb", 10**7, 10**6), "math.comb' is not on the list"),
    "power of constants": (call("operator.pow", 2, 10**9), "computes with constants only"),
    "power": (call("operator.pow", X, 10**9), "expected at most 1024"),
    "power of a number": (call("operator.pow", 10**9, X), "expected at most 1048576"),
    "shift": (call("operator.lshift", X, 10**9), "expected at most 1024"),
    "text": (call("operator.mul", "x", 10**12), "computes with constants only"),
    "list": (call("operator.mul", [0], 10**12), "computes with constants only"),
    "zeros": (call("torch.zeros", {"tuple": [10**6, 10**6]}), "zeros is asked for 1e\\+12"),
    "full": (call("torch.full", [10**5, 10**5], 1.0), "full is asked for 1e\\+10"),
    "numbers": (call("torch.arange", 10**12), "arange is asked for 1e\\+12"),
    "expand": (call("expand", X, 10**6, 10**6, op="call_method"), "expand is asked for 1e\\+12"),
    "repeat": (call("repeat", X, {"tuple": [10**10]}, op="call_method"), "repeat is asked for 1e\\+10"),
    "interpolate": (call("torch.nn.functional.interpolate", X, scale_factor=1e9), "interpolate is asked for 1e\\+09"),
    "an integer of 1000 digits": (call("torch.add", X, 10**1000), "integer of 3322 bits"),
    "a shape without memory": (lambda d: d["tensors"][CODES].update(shape=[10**9] * 4), CODES),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_numbers_that_would_exhaust_the_machine(checkpoint, attack):
    change, message = ATTACKS[attack]
    edit(checkpoint, change)
    refused(checkpoint, message)


def test_a_layer_makes_no_more_tensors_than_the_file_has(checkpoint):
    """Whatever its arguments are called."""
    many = {"in_channels": 1, "hidden_channels": [1] * 10**4}
    edit(checkpoint, module(type="torchvision.ops.MLP", args=many))
    refused(checkpoint, "far more than the 0 tensors")


def test_scales_cannot_blow_up_codes(checkpoint):
    from tests.export.checkpoint.test_bad import SCALE, retensor

    for scales in (torch.ones(16), torch.ones(8, 10**4), torch.ones(8, dtype=torch.int32)):
        retensor(checkpoint, lambda tensors, scales=scales: tensors.update({SCALE: scales}))
        layout = {"dtype": str(scales.dtype)[6:], "shape": list(scales.shape)}
        edit(checkpoint, lambda document, layout=layout: document["tensors"].update({SCALE: layout}))
        refused(checkpoint, "module 0: its weight has codes")


@pytest.mark.parametrize("name", ["network.json", "weights.safetensors"])
def test_only_regular_files_are_read(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, f"{name} cannot be read: it is not a regular file")
    if name == "network.json":
        with pytest.raises(UserError, match="holds other files than a checkpoint"):
            save_folded(folded_network(flat_cnn(), IMAGES), checkpoint)
    for other in (Path("/dev/zero"), checkpoint):
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(other)
        refused(checkpoint, f"{name} cannot be read")


def test_a_pipe_in_place_of_the_folder(tmp_path):
    os.mkfifo(tmp_path / "net")
    refused(tmp_path / "net", "cannot be read")


def build_with_huge_arguments() -> None:
    """Every class of the allow-list, each of its arguments huge in turn, the others small."""
    for name, kind in module_classes().items():
        parameters = [p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "args", "kwargs")]
        required = [p for p, x in inspect.signature(kind.__init__).parameters.items() if x.default is x.empty][1:]
        for huge in parameters:
            for value in (HUGE, [HUGE, HUGE], 1e11):
                args = {p: 2 for p in required if p in parameters} | {huge: value}
                try:
                    module = build_module({"type": name, "args": args, "codes": {}}, {})
                except Exception:  # noqa: S112 - that it ends is the point
                    continue
                assert not list(module.parameters())


@pytest.mark.slow
def test_no_constructor_takes_long_or_much_memory():
    limited("build_with_huge_arguments")


def test_a_newer_checkpoints_granularity_is_no_damage(checkpoint, monkeypatch):
    from bnre_exp.export.checkpoint import module_json
    from bnre_exp.quantsim.quantizers.quantizer import Dequantize

    def with_granularity(per_channel=True, **arguments):
        return Dequantize(**arguments)

    monkeypatch.setattr(module_json, "Dequantize", with_granularity)
    edit(checkpoint, codes(per_channel=True))
    load_folded(checkpoint)
    edit(checkpoint, codes(per_channel=HUGE))
    refused(checkpoint, "do not fit")


def test_what_real_networks_compute_from_sizes_still_loads(tmp_path):
    class Sizes(nn.Module):
        def forward(self, x):
            n, c, h, w = x.shape
            x = x.reshape(n, c // 2, 2, h * w) ** 2
            y = x.new_zeros(n, 4) + x.new_full((1,), -1e30).clamp(min=0)
            return x.flatten(1)[:, : 2**62].sum() * 10**6 + y.sum() + 2 ** x.dim()

    x = torch.randn(2, 4, 3, 3)
    folded, _ = trace(Sizes(), [x])
    assert save_folded(folded, tmp_path / "net") == ()
    assert_same(folded, load_folded(tmp_path / "net"), x)
