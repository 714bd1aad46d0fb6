"""torchvision's and timm's classification networks: by name, with weights, preprocessing and a head that fit."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import nn

from bnre_exp.data.preprocess import Preprocessing
from bnre_exp.errors import UserError

logger = logging.getLogger(__name__)

_OFF = ("", "false", "none", "null")
_ON = ("true", "default")

# Libraries whose own exceptions, besides OSError, mean that a download failed.
_DOWNLOADERS = ("http", "httpx", "httpcore", "requests", "urllib3", "huggingface_hub")


@dataclass(frozen=True)
class BuiltModel:
    """A network and what is known about it.

    ``preprocessing``: what its weights were trained with, None where that is not known. ``pretrained``: weights or a
    checkpoint were loaded. ``notes``: lines for the run's report. ``takes_unit_range``: its input are pixels in [0, 1],
    which it normalises itself, if at all. ``submodules``: the parts of it that can be quantized, where that is not the
    whole. ``at_size``: lets it take images of a height and width, where it has a size of its own.
    """

    module: nn.Module
    preprocessing: Preprocessing | None = None
    pretrained: bool = False
    notes: tuple[str, ...] = ()
    takes_unit_range: bool = False
    submodules: tuple[str, ...] = ()
    at_size: Callable[[int], None] | None = None


def torchvision_model(
    name: str, num_classes: int, weights: str | None = None, *, replace_head: bool = False, **kwargs: Any
) -> nn.Module:
    """torchvision's classification network ``name``; ``weights``: DEFAULT or a name such as IMAGENET1K_V1.

    Weights of another class count raise UserError unless ``replace_head``; so do unknown names and failed downloads.
    """
    return build_torchvision(name, num_classes, weights, True, replace_head, kwargs).module


def timm_model(
    name: str, num_classes: int, weights: str | None = None, *, replace_head: bool = False, **kwargs: Any
) -> nn.Module:
    """timm's network ``name`` (``resnet18`` or, with a weights tag, ``resnet18.a1_in1k``); ``weights``: true or null.

    Raises UserError as :func:`torchvision_model` does, and where timm is not installed.
    """
    return build_timm(name, num_classes, weights, True, replace_head, kwargs).module


def torchvision_preprocessing(transforms: Any) -> Preprocessing:
    """What torchvision's ``weights.transforms()`` does, as :class:`Preprocessing`."""
    return Preprocessing(
        image_size=int(transforms.crop_size[0]),
        resize_size=int(transforms.resize_size[0]),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        channels=len(transforms.mean),
    )


def timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """What timm's ``resolve_model_data_config`` says, as :class:`Preprocessing`; every crop is the centre one."""
    channels, height, width = config["input_size"]
    if height != width or config.get("crop_mode", "center") != "center":
        logger.warning("a square centre crop is used where timm's data config says %s", dict(config))
    return Preprocessing(
        image_size=height,
        # timm rounds down, and its random choice between filters is for training only.
        resize_size=max(height, int(height / config["crop_pct"])),
        mean=tuple(config["mean"])[:channels],
        std=tuple(config["std"])[:channels],
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "nearest") else "bicubic",
        channels=channels,
    )


def build_torchvision(
    name: str, num_classes: int, weights: str | None, fetch: bool, replace_head: bool, kwargs: Mapping[str, Any]
) -> BuiltModel:
    """As :func:`torchvision_model`, with what is known; without ``fetch`` weights give the preprocessing only."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(unknown_name(name, torchvision.models.list_models(module=torchvision.models), "torchvision"))
    wanted = weights_setting(weights)
    entry = torchvision_weights(name, wanted) if wanted else None
    options = dict(kwargs)
    if entry is not None and not fetch and name in ("googlenet", "inception_v3"):
        # With weights, these two renormalise their input by default: the checkpoint's values expect it as well.
        options.setdefault("transform_input", True)
    fetched = entry if fetch else None
    classes = len(fetched.meta["categories"]) if fetched is not None else num_classes
    _check_classes(name, classes, num_classes, replace_head)

    def build() -> nn.Module:
        module: nn.Module = torchvision.models.get_model(name, weights=fetched, num_classes=classes, **options)
        return module

    module = guarded(build, name, options, weights if fetched else None, getattr(fetched, "url", ""))
    notes = replace_heads(module, num_classes) if fetched else ()
    preprocessing = torchvision_preprocessing(entry.transforms()) if entry is not None else None
    return BuiltModel(module, preprocessing, fetched is not None, notes)


def build_timm(
    name: str, num_classes: int, weights: str | None, fetch: bool, replace_head: bool, kwargs: Mapping[str, Any]
) -> BuiltModel:
    """As :func:`timm_model`, with what is known; without ``fetch`` weights give the preprocessing only."""
    try:
        import timm
    except ImportError as error:
        raise UserError("model: timm is not installed; run `pip install timm`, or take another model group.") from error
    if ":" not in name and not timm.is_model(name):
        raise UserError(unknown_name(name, timm.list_models(), "timm"))
    wanted = weights_setting(weights)
    if wanted not in (None, "DEFAULT"):
        raise UserError(
            f"model.weights={weights}: expected true for timm's networks; other weights are chosen by a tag in "
            f"model.name, such as {name.partition('.')[0]}.TAG (timm.list_pretrained() lists them)."
        )
    fetched = wanted is not None and fetch
    try:
        config = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(name.partition(".")[0] + ".*"))
        raise UserError(f"model.name={name}: {error} Expected one of {tags or name.partition('.')[0]}.") from error
    classes = config.num_classes if fetched and config is not None else num_classes
    _check_classes(name, classes, num_classes, replace_head)
    options: dict[str, Any] = {**kwargs} if fetched else {"num_classes": num_classes, **kwargs}
    module = guarded(
        lambda: timm.create_model(name, pretrained=fetched, **options),
        name,
        kwargs,
        weights if fetched else None,
        (getattr(config, "hf_hub_id", None) or getattr(config, "url", None) or name) if fetched else "",
    )
    notes: tuple[str, ...] = ()
    if fetched and module.num_classes != num_classes:
        _check_classes(name, int(module.num_classes), num_classes, replace_head)
        notes = (f"head replaced: {module.num_classes} classes in the weights, {num_classes} in the dataset",)
        module.reset_classifier(num_classes)
    preprocessing = timm_preprocessing(timm.data.resolve_model_data_config(module)) if wanted else None
    return BuiltModel(module, preprocessing, fetched, notes)


def weights_setting(weights: str | None) -> str | None:
    """``model.weights`` as a name: DEFAULT for true, None for false or nothing."""
    text = "" if weights is None else str(weights)
    if text.lower() in _OFF:
        return None
    return "DEFAULT" if text.lower() in _ON else text


def head_names(module: nn.Module) -> list[str]:
    """The layers whose outputs are the classes: the last Linear (or else convolution), and auxiliary heads like it."""
    for kind, size in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
        layers = [(name, getattr(layer, size)) for name, layer in module.named_modules() if isinstance(layer, kind)]
        if layers:
            last, classes = layers[-1]
            return [name for name, out in layers if name == last or (name.lower().startswith("aux") and out == classes)]
    return []


def replace_heads(module: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Replace, in place, heads of another class count by new ones of ``num_classes``; returns notes for the report."""
    notes = []
    for name in head_names(module):
        old: Any = module.get_submodule(name)
        bias = old.bias is not None
        new: nn.Module
        if isinstance(old, nn.Linear):
            count, new = old.out_features, nn.Linear(old.in_features, num_classes, bias)
        else:
            count = old.out_channels
            new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, bias=bias)
        if count == num_classes:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, new.to(old.weight.device, old.weight.dtype))
        notes.append(f"head replaced: {name} had {count} classes, the dataset has {num_classes}")
    return tuple(notes)


def torchvision_weights(name: str, wanted: str) -> Any:
    """The weights of a network of torchvision by their name, or DEFAULT. Raises ``UserError`` for unknown ones."""
    entries = torchvision.models.get_model_weights(name)
    prefix, _, entry = wanted.rpartition(".")
    known = [member.name for member in entries]
    if (prefix and prefix != entries.__name__) or (entry != "DEFAULT" and entry not in known) or not known:
        raise UserError(
            f"model.weights={wanted} is unknown for {name}; expected "
            + (f"DEFAULT or one of {', '.join(known)}." if known else "null: torchvision has no weights for it.")
        )
    return entries[entry]


def unknown_name(name: str, names: Iterable[str], library: str, kind: str = "classification network") -> str:
    """What is told of a name that a library does not know, with those that are close to it."""
    close = difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
    hint = f"Close names: {', '.join(close)}." if close else f"{library}'s list_models() lists them."
    return f"model.name={name} is not a {kind} of {library}. {hint}"


def _check_classes(name: str, classes: int, num_classes: int, replace_head: bool) -> None:
    if classes != num_classes and not replace_head:
        raise UserError(
            f"model.weights: the weights of {name} have {classes} classes, the dataset has {num_classes} "
            "(dataset.num_classes). Set model.replace_head=true to put a new, untrained head in their place."
        )


def guarded(
    build: Callable[[], nn.Module], name: str, kwargs: Mapping[str, Any], weights: str | None, source: str
) -> Any:
    """``build()``; wrong arguments and, with ``weights``, a failed download raise UserError."""
    try:
        return build()
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        broken = isinstance(error, OSError) or library in _DOWNLOADERS or "invalid hash value" in str(error)
        if weights is not None and broken:
            raise UserError(
                f"model.weights={weights}: {source} could not be fetched ({type(error).__name__}: {error}). Download "
                "it where there is internet access and give the file as model.checkpoint=FILE; model.weights may stay, "
                "it then only sets the preprocessing."
            ) from error
        if isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise UserError(f"model.name={name} cannot be built with model.kwargs={dict(kwargs)}: {error}") from error
        raise
