"""The text of ``bnre-exp --help``, made from the config dataclasses and the folder of config groups."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from bnre_exp.config import Config, LayerOverride

WIDTH = 118
_GAP = 2

INTRODUCTION = """\
Does re-estimating the batch-norm statistics of a quantized network help, with how many batches, and what do I ship?
One job trains or loads an FP32 network, quantizes it, trains it further (QAT), re-estimates its BN statistics, folds BN
into the weights and exports the result; after each stage it evaluates the network by the metrics of its task, and logs
them to MLflow.

Usage: bnre-exp [GROUP=CHOICE ...] [FIELD=VALUE ...] [-m]          (python -m bnre_exp is the same)

  bnre-exp                                              the defaults: ResNet-18 on digits, 4-bit weights
  bnre-exp model=mobilenet_v2 dataset=fashion_mnist     another network, another dataset
  bnre-exp qat=off quant=w3a8 reest.num_batches=50      PTQ: calibrated, re-estimated, not trained
  bnre-exp -m quant.weight_bits=2,3,4,8 reest.num_batches=0,10,100      multirun: one run each, 12 in all
  bnre-exp model=mobilenet_v2 model.kwargs.width_mult=0.5    an argument of the network's constructor
  bnre-exp model=custom model._target_=mynet.MyNet      your own network, from mynet.py in the working directory
  bnre-exp experiment=smoke                             seconds: every stage, on a few images
  bnre-exp 'quant.overrides=[{pattern: "layer4.*", weight_bits: 8}]'    exceptions by layer

  --help   --version   --cfg job (the composed configuration)   --hydra-help (all flags of Hydra)
  eval "$(bnre-exp -sc install=bash)" completes what is typed, in this shell
  bnre-exp ui opens the page of the runs in MLflow.
  bnre-exp-onnx re-estimates and folds ONNX files; bnre-exp-store lists and prunes kept stages; bnre-exp-sync brings to
  MLflow what it missed; bnre-exp-compare compares runs. Each has --help.
"""

_GROUP_NOTES = {
    "dataset": "yours: image_folder, or a callable named by dataset._target_",
    "model": "yours: custom with model._target_, timm with model.name, onnx with model.path",
    "task": "loss, metrics and agreement; yours: custom with task._target_, a class as in bnre_exp/tasks/task.py",
    "experiment": "a file that sets fields of several groups; yours: conf/experiment/NAME.yaml, or --config-dir DIR",
}


def version_text() -> str:
    """The line that ``--version`` prints."""
    try:
        return f"bnre_exp {version('bnre_exp')}\n"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "bnre_exp (not installed)\n"


def help_text(conf: Path, own: Path | None = None) -> str:
    """The whole help. conf: the folder of config groups, whose files are the choices; own: one more, of the user."""
    chosen = _chosen(conf)
    values = _values(conf, chosen)
    marks = "* marks the default choice" + (f", + those of {own}" if own is not None else "")
    parts = [INTRODUCTION, f"Config groups (GROUP=CHOICE); {marks}\n", _groups(conf, own, chosen)]
    parts.append("Fields (FIELD=VALUE): name, type, default (under the default choices), meaning, [unit], (range)\n")
    parts.append(_section(Config, "", values))
    for item in fields(Config):
        if isinstance(item.default_factory, type) and is_dataclass(item.default_factory):
            parts.append(_section(item.default_factory, item.name, values))
    parts.append(_section(LayerOverride, "quant.overrides[]", {}))
    return "\n".join(parts)


def _chosen(conf: Path) -> dict[str, str]:
    """The default choice of each group."""
    entries = [entry for entry in OmegaConf.load(conf / "config.yaml").defaults if not isinstance(entry, str)]
    return {str(group): str(choice) for entry in entries for group, choice in entry.items()}


def _values(conf: Path, chosen: dict[str, str]) -> dict[str, Any]:
    """What the default choices set, by the names the user types."""
    values: dict[str, Any] = {}
    for group, choice in chosen.items():
        file = conf / group / f"{choice}.yaml"
        if file.exists():
            contents = OmegaConf.to_container(OmegaConf.load(file))
            if isinstance(contents, dict):
                values.update({f"{group}.{name!s}": value for name, value in contents.items()})
    return values


def _groups(conf: Path, own: Path | None, chosen: dict[str, str]) -> str:
    shipped, added = _choices(conf), _choices(own) if own is not None else {}
    lines = []
    for group in sorted({*shipped, *added}):
        names = [f"{name}*" if name == chosen.get(group) else name for name in shipped.get(group, [])]
        names += [f"{name}+" for name in added.get(group, []) if name not in shipped.get(group, [])]
        note = _GROUP_NOTES.get(group)
        lines += _aligned([group], [12], f"{', '.join(names)}  ({note})" if note else ", ".join(names))
    return "\n".join(lines) + "\n"


def _choices(folder: Path) -> dict[str, list[str]]:
    """The choices of each group: files in its folder, or in folders of that (``experiment=mine/first``)."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        group, *rest = file.relative_to(folder).with_suffix("").parts
        if rest:
            found.setdefault(group, []).append("/".join(rest))
    return found


def _section(section: Any, group: str, values: dict[str, Any]) -> str:
    """A heading, and the fields of one dataclass in columns."""
    types = get_type_hints(section)
    heading = f"{group or 'general'}: {(section.__doc__ or '').strip().splitlines()[0]}"
    lines = textwrap.wrap(heading, WIDTH, subsequent_indent="    ")
    for item in fields(section):
        if item.metadata["is_old"] or (isinstance(item.default_factory, type) and is_dataclass(item.default_factory)):
            continue
        name = f"{group}.{item.name}" if group else item.name
        default = _value_text(values[name] if name in values else _default(item))
        lines += _aligned([name, type_name(types[item.name]), default], [27, 12, 14], _document(item))
    return "\n".join(lines) + "\n"


def _aligned(cells: list[str], widths: list[int], text: str) -> list[str]:
    """Columns, the last one wrapped; a cell that is too wide pushes the text to the next line."""
    start = 2 + sum(widths) + _GAP * len(widths)
    line = "  "
    for index, cell in enumerate(cells):
        end = 2 + sum(widths[: index + 1]) + _GAP * (index + 1)
        line = (line + cell + " " * _GAP).ljust(end)
    wrapped = textwrap.wrap(text, WIDTH - start) or [""]
    if len(line) > start:
        return [line.rstrip(), *(" " * start + more for more in wrapped)]
    return [line + wrapped[0], *(" " * start + more for more in wrapped[1:])]


def type_name(annotation: Any) -> str:
    """A type as a user reads it: int, int|null, [number], {key: value}, choice."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if type(None) in arguments:
        return f"{type_name(arguments[0])}|null"
    if origin is list:
        return f"[{type_name(arguments[0])}]"
    if origin is dict:
        return "{key: value}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "choice"
    if isinstance(annotation, type) and is_dataclass(annotation):
        return "{...}"
    return {int: "int", float: "number", str: "text", bool: "true|false"}.get(annotation, str(annotation))


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _value_text(value: Any) -> str:
    """A value as the user types it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_value_text(entry) for entry in value) + "]"
    if isinstance(value, str):
        return value or '""'
    return value.name if isinstance(value, Enum) else str(value)


_SYMBOLS = {"at least": ">=", "greater than": ">", "at most": "<=", "less than": "<"}


def _document(item: Field[Any]) -> str:
    bounds = {words: bound for words, bound in item.metadata["bounds"].items() if bound is not None}
    document: str = item.metadata["doc"]
    if not bounds:
        return document
    return f"{document} ({', '.join(f'{_SYMBOLS[words]} {_number(bound)}' for words, bound in bounds.items())})"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
