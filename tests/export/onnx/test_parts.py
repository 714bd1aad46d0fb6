"""Parts of a folded network as ONNX models, a file each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from bnre_exp import QuantScheme, UserError, calibrate, export_onnx, fold_batch_norms, quantize, quantize_biases
from bnre_exp.export.onnx.model import check_exportable
from bnre_exp.quantsim.nodes import module_of
from bnre_exp.quantsim.parts import inputs_of_parts
from bnre_exp.quantsim.whole import parts_of
from tests.detectors import PARTS, block, detector, equal, folded_detector, images, tensors
from tests.networks import Net, randomize


@pytest.fixture(scope="module")
def folded():
    return folded_detector(detector(), weight_bits=4)


@pytest.fixture(scope="module")
def written(folded, tmp_path_factory):
    """And the network is left as it is."""
    path, example = tmp_path_factory.mktemp("onnx") / "net", images()[0]
    folded.head.train()
    modes, state = [(m, m.training) for m in folded.modules()], copy.deepcopy(folded.state_dict())
    export_onnx(folded, example, path)
    assert all(m.training == training and not m._forward_pre_hooks for m, training in modes)
    assert equal(folded.state_dict(), state) and torch.equal(example, images()[0])
    folded.eval()
    return path


def outputs(path: Path, inputs: tuple[Tensor, ...], optimize: bool) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return run.run(None, {item.name: x.numpy() for item, x in zip(run.get_inputs(), inputs, strict=True)})


def steps_of_outputs(graph: Any) -> list[float]:
    """The step of the quantizer that each output comes from."""
    (output,) = graph.graph.find_nodes(op="output")
    return [float(module_of(node).scale.detach().abs()) for node in output.all_input_nodes]


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_onnx_runtime_gives_the_codes_of_each_part(folded, written, batch, optimize):
    """For batches of other sizes too; a few values lie on the next code, more so in ONNX Runtime's integer kernels."""
    assert {path.name for path in written.iterdir()} == {"backbone.onnx", "head.onnx"}
    for name, inputs in inputs_of_parts(folded, images()[batch]).items():
        graph = parts_of(folded)[name]
        with torch.no_grad():
            wanted = tensors(graph(*inputs))
        found, steps = outputs(written / f"{name}.onnx", inputs, optimize), steps_of_outputs(graph)
        assert len(found) == len(wanted) == len(steps) == 2
        for a, b, step in zip(found, wanted, steps):
            assert a.shape == tuple(b.shape)
            codes, expected = a / step, b.numpy() / step
            assert np.abs(codes - codes.round()).max() < 1e-3 and len(np.unique(codes.round())) > 5
            assert np.abs(codes - expected).max() < 1.01 and (np.abs(codes - expected) > 0.5).mean() < (
                0.06 if optimize else 0.03
            )


def test_weights_are_the_codes_of_the_part_under_its_own_names(folded, written):
    model = onnx.load(written / "backbone.onnx")
    onnx.checker.check_model(model, full_check=True)
    codes = next(x for x in model.graph.initializer if x.name == "stem.0.weight_codes")
    expected = folded.get_submodule("backbone.network.stem.0").parametrizations.weight.original
    assert codes.data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(numpy_helper.to_array(codes).astype(np.int8), expected.numpy())
    assert all(item.type.tensor_type.shape.dim[0].dim_param for item in model.graph.input)


def test_parts_within_modules_and_constants_in_calls(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(3, 8)

        def forward(self, x: Tensor, factor: float, *, shift: Tensor) -> dict[str, Tensor]:
            return {"sum": self.block(x) * factor + shift}

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model.deep.scaled(x, 2.0, shift=x[:, :1].clone())["sum"]

    model = randomize(Net(forward, deep=nn.ModuleDict({"scaled": Scaled()}))).eval()
    sim = quantize(model, images()[0], submodules=["deep.scaled"])
    check_exportable(sim, images()[0], 21)
    calibrate(sim, images(), num_batches=4)
    folded, _ = fold_batch_norms(sim)
    quantize_biases(folded)
    export_onnx(folded, images()[0], tmp_path)
    (wanted,) = tensors(folded(images()[1]))
    (found,) = outputs(tmp_path / "deep.scaled.onnx", (images()[1], images()[1][:, :1]), True)
    (step,) = steps_of_outputs(parts_of(folded)["deep.scaled"])
    difference = np.abs(found - wanted.detach().numpy()) / step
    assert difference.max() < 1.01 and (difference > 0.5).mean() < 0.03


def test_what_cannot_be_exported_is_told_with_the_part(folded, tmp_path):
    sim = quantize(detector(), images()[0], submodules=PARTS)
    with pytest.raises(UserError, match="has no range yet: run calibrate"):
        export_onnx(sim, images()[0], tmp_path / "net")
    calibrate(sim, images(), num_batches=4)
    with pytest.raises(UserError, match=r"backbone\.onnx cannot be exported: .*not folded"):
        export_onnx(sim, images()[0], tmp_path / "net")
    with pytest.raises(UserError, match=r"backbone\.onnx cannot be exported: .*at least 2"):
        export_onnx(folded, images()[0][:1], tmp_path / "net")
    with pytest.raises(UserError, match="The network fails on the example in evaluation mode"):
        export_onnx(folded, images()[0][:, :2], tmp_path / "net")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(folded, images()[0], tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_simulation_that_onnx_cannot_express_is_refused_before_it_is_trained(tmp_path):
    sim = quantize(detector(), images()[0], QuantScheme(12, 12), submodules=["backbone"])
    with pytest.raises(UserError, match="opset"):
        check_exportable(sim, images()[0], 13)
    assert not any(quantizer.bypassed for quantizer in sim.modules() if hasattr(quantizer, "bypassed"))
