"""An ONNX file as a folder that MLflow loads and serves."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np


def package_onnx(path: Path, folder: Path, example: np.ndarray) -> None:
    """Write ``folder``, which ``mlflow.pyfunc.load_model`` takes; replaced if it is there. Products are exact there.

    example: one input ``[1, ...]``, which becomes the input example; the signature follows from it and the output.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from bnre_exp.onnx_io.session import EXACT, open_session, unshared

    model = unshared(onnx.load(path))  # so that it loads with the options below
    session = open_session(model)
    source = session.get_inputs()[0]
    outputs = dict(zip([item.name for item in session.get_outputs()], session.run(None, {source.name: example})))

    def spec(name: str, values: np.ndarray) -> TensorSpec:
        return TensorSpec(values.dtype, (-1, *values.shape[1:]), name)

    signature = ModelSignature(
        Schema([spec(source.name, example)]), Schema([spec(name, values) for name, values in outputs.items()])
    )
    shutil.rmtree(folder, ignore_errors=True)
    mlflow.onnx.save_model(
        model, str(folder), signature=signature, input_example={source.name: example}, save_as_external_data=False,
        onnx_session_options={"extra_session_config": EXACT},
        pip_requirements=[f"{name}=={version(name)}" for name in ("onnx", "onnxruntime", "numpy")],
    )  # fmt: skip
