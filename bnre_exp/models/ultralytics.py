"""Networks of Ultralytics, from their own descriptions or a file of trained weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from bnre_exp.errors import UserError, few, first_line
from bnre_exp.models.zoo import BuiltModel

KINDS = {
    "detect": "DetectionModel", "segment": "SegmentationModel", "pose": "PoseModel", "classify": "ClassificationModel",
}  # fmt: skip


def ultralytics_model(
    name: str | None = None,
    num_classes: int | None = None,
    path: str | None = None,
    trusted: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Ultralytics' network ``name``, such as yolov8n, yolo11n-seg or yolov8n-pose, untrained; or that of a file.

    path: a ``.pt`` file, which is a pickle: reading it runs whatever code is in it, hence trusted. Raises ``UserError``
    for names that Ultralytics does not know, another number of classes, and where it is not installed.
    """
    return build_ultralytics(name, num_classes, path, trusted, kwargs).module


class ClassLogits(nn.Module):
    """The head ``Classify`` of Ultralytics, whose parts it takes over, but with logits ``[N, classes]`` in both modes;
    theirs gives probabilities in evaluation mode."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.conv, self.pool, self.drop, self.linear = head.conv, head.pool, head.drop, head.linear
        self.i, self.f = head.i, head.f  # by which their networks call their layers
        self.type = head.type  # type: ignore[method-assign]
        self.train(head.training)

    def forward(self, x: Any) -> Tensor:
        x = torch.cat(x, 1) if isinstance(x, list) else x
        logits: Tensor = self.linear(self.drop(self.pool(self.conv(x)).flatten(1)))
        return logits


def build_ultralytics(
    name: str | None, num_classes: int | None, path: str | None, trusted: bool, kwargs: dict[str, Any]
) -> BuiltModel:
    """As :func:`ultralytics_model`, with what is known of it. In evaluation mode the network returns what Ultralytics'
    exported models do: decoded boxes, and masks' prototypes; one for classification returns logits in both modes."""
    try:
        from ultralytics.nn import tasks
        from ultralytics.utils import patches
    except ImportError as error:
        raise UserError(
            f"model: Ultralytics cannot be imported ({first_line(error)}); run `pip install bnre_exp[ultralytics]`. "
            "Where libGL is missing, `pip install opencv-python-headless` helps."
        ) from error
    Image.open = patches._image_open  # Pillow's own: theirs wants to install packages for a file that is no picture
    if path is not None:
        module = _loaded(tasks, Path(path), num_classes, trusted)
    elif name:
        module = _made(tasks, name, num_classes, kwargs)
    else:
        raise UserError("model.name is not set: expected a network such as yolov8n, or model.path=best.pt.")
    head, notes = module.model[-1], tuple[str, ...]()
    if type(module).__name__ == KINDS["classify"]:
        module.model[-1] = ClassLogits(head)
        notes = ("the network returns logits in evaluation mode, where Ultralytics' own returns probabilities",)
    else:
        head.export = True  # evaluation returns decoded boxes alone; training mode is as ever
    return BuiltModel(module, None, path is not None, notes, takes_unit_range=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ultralytics tells nothing but warnings."""
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _made(tasks: Any, name: str, num_classes: int | None, kwargs: dict[str, Any]) -> Any:
    try:
        description = tasks.yaml_model_load(f"{name.removesuffix('.yaml')}.yaml")
        kind = tasks.guess_model_task(description)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"model.name={name}: Ultralytics has no such network ({first_line(error)}); expected one such as yolov8n, "
            "yolov5s, yolov10n, yolo11n-seg or yolo12n."
        ) from error
    if kind not in KINDS:
        raise UserError(f"model.name={name}: a network for {kind or 'no task'}; expected one for {', '.join(KINDS)}.")
    if num_classes is None:
        raise UserError("dataset.num_classes is not set, and the network's head needs it. Set it.")
    try:
        with _quiet():
            return getattr(tasks, KINDS[kind])({**description, "nc": num_classes}, verbose=False, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.name={name} cannot be built with model.kwargs={kwargs}: {first_line(error)}."
        ) from error


def _loaded(tasks: Any, path: Path, num_classes: int | None, trusted: bool) -> Any:
    if path.suffix != ".pt":
        raise UserError(f"model.path={path}: expected a .pt file, as Ultralytics writes it.")
    if not trusted:
        raise UserError(
            f"model.path={path}: a .pt file of Ultralytics is a pickle, and reading it runs whatever code is in it. If "
            "you know where it is from, set model.trusted=true."
        )
    if not path.is_file():
        raise UserError(f"model.path={path}: there is no such file.")
    from ultralytics import YOLO

    try:
        with _quiet():
            module: Any = YOLO(str(path)).model
            module = module.float()
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"model.path={path} cannot be read by Ultralytics: {first_line(error)}.") from error
    if type(module) not in [getattr(tasks, kind) for kind in KINDS.values()]:
        raise UserError(f"model.path={path} holds a {type(module).__name__}; expected one for {', '.join(KINDS)}.")
    for parameter_name, parameter in module.named_parameters():  # files hold networks for inference
        parameter.requires_grad_(".dfl" not in parameter_name)  # which is no weight, but the numbers 0, 1, 2, ...
    classes = len(module.names)
    if num_classes not in (None, classes):
        raise UserError(
            f"model.path={path} tells {classes} classes apart ({few([str(n) for n in module.names.values()])}), the "
            f"dataset has {num_classes}. Train it on this dataset, or correct dataset.num_classes."
        )
    return module
