"""From overrides to a checked configuration."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnre_exp.cli.mistakes import SEE_HELP, explain_choice, explain_configuration, is_full_disk
from bnre_exp.config import Config
from bnre_exp.credentials import without_credentials
from bnre_exp.digests import digest
from bnre_exp.errors import UserError, first_line


def config_folder() -> Path:
    """The folder of the config groups: inside the package where a wheel installed it, else beside the package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register() -> None:
    ConfigStore.instance().store(name="config_schema", node=_schema())  # a copy of it
    OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)


@cache
def _schema() -> Any:
    schema = OmegaConf.structured(_as_written(Config))
    # A builder's own arguments are open: model.kwargs.width=2
    for section in (schema.model, schema.dataset, schema.task):
        OmegaConf.set_struct(section.kwargs, False)
    return schema


def _as_written(section: Any) -> Any:
    """A dataclass of the schema whose switches keep what is written; OmegaConf would make true of any number."""

    def kind(annotation: Any) -> Any:
        if get_origin(annotation) is list and is_dataclass(get_args(annotation)[0]):
            return list[_as_written(get_args(annotation)[0])]  # type: ignore[misc]
        return Any if annotation is bool else annotation

    columns: list[Any] = []
    hints = get_type_hints(section)
    for item in fields(section):
        default: Any = item.default_factory
        if isinstance(default, type) and is_dataclass(default):
            inner = _as_written(default)
            columns.append((item.name, inner, field(default_factory=inner)))
        else:
            own = field(default=item.default) if default is MISSING else field(default_factory=default)
            columns.append((item.name, kind(hints[item.name]), own))
    return make_dataclass(section.__name__, columns)


def _refuse_other_numbers(section: Any, values: Any, prefix: str = "") -> None:
    """Raise ``UserError`` for a switch that is a number other than 0 and 1."""
    hints = get_type_hints(section)
    for item in fields(section):
        value, kind = values.get(item.name) if isinstance(values, dict) else None, hints[item.name]
        if kind is bool and type(value) is int and value not in (0, 1):
            raise UserError(f"{prefix}{item.name}={value}: expected true or false; it means: {item.metadata['doc']}.")
        inner = (get_args(kind) or (kind,))[0]
        for part in value if isinstance(value, list) else [value]:
            if is_dataclass(inner):
                _refuse_other_numbers(inner, part, f"{prefix}{item.name}.")


def typed(composed: DictConfig) -> Config:
    """The composed configuration as checked dataclasses. Raises ``UserError`` for an unknown key or a bad value."""
    try:
        # Plain values: merging two structured configurations would drop an unknown key (+quant.foo=1) silently.
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        _refuse_other_numbers(Config, plain)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain_configuration(error)) from error
    if not isinstance(config, Config):
        raise TypeError(f"expected a Config, got {type(config).__name__}")
    return config


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked configuration that the command line would run with these overrides. Raises ``UserError``."""
    register()
    is_within = GlobalHydra.instance().is_initialized()  # in a job; Hydra refuses to be started there again
    try:
        with (
            nullcontext()
            if is_within
            else hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_folder()))
        ):
            composed = hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise as_mistake(error) from error
    return typed(composed)


@cache
def plain_config() -> Config | None:
    """What a command without overrides composes, here and now; None where that is no configuration, as after a change
    of the files."""
    with suppress(UserError):
        return compose_config([])
    return None


def as_mistake(error: BaseException) -> BaseException:
    """Hydra's and OmegaConf's complaints about the configuration as a ``UserError``; any other error as it is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return UserError(explain_choice(error.missing_cfg_file, error.options or []))
    is_plain = _is_plain_error_of_a_library(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)) or (is_plain and isinstance(error, ValueError)):
        return UserError(explain_configuration(error))
    if is_plain:
        return UserError(
            f"an override does not fit the configuration ({first_line(error)}): write GROUP=CHOICE or FIELD=VALUE, and "
            f"for a list the whole of it, dataset.mean=[0.5]. {SEE_HELP}"
        )
    # Hydra makes the run folder before the job starts
    if isinstance(error, OSError) and error.filename and not is_full_disk(error):
        return UserError(
            f"cannot write to {error.filename}: {error.strerror}. Set runtime.output_dir, or BNRE_OUTPUT_DIR, to a "
            "folder that can be written."
        )
    return error


def _is_plain_error_of_a_library(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised it and meant an override: quant=3, where quant is a group, is a ValueError,
    model=[1,2] a TypeError, dataset.mean.a=1 one of int()."""
    if type(error) not in (ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(("hydra._internal.", "hydra.core.", "omegaconf."))


def own_part(composed: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's part."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def identity_of(composed: DictConfig) -> str:
    """Of a configuration, without Hydra's own part, and of the code that it runs."""
    from bnre_exp.jobs.plan import code_identity

    own = own_part(composed)
    try:
        code = code_identity(typed(own))
    except UserError:  # a mistake, which is told where it matters
        code = ""
    return digest([_without_credentials(own), code])


def _without_credentials(own: DictConfig) -> dict[str, Any]:
    """A run stays itself with another password, and whether its URI was written with one or not."""
    plain = container_of(own)
    with suppress(OmegaConfBaseException, UserError):  # told where it matters
        uri = OmegaConf.select(own, "tracking.uri")
        plain["tracking"] |= {"uri": without_credentials(uri)} if uri else {}
    return plain


def container_of(composed: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(composed, resolve=False, enum_to_str=True)
    return dict(plain)


def section_of(composed: DictConfig, name: str, kind: Any) -> Any:
    plain = OmegaConf.to_container(composed[name], resolve=True, throw_on_missing=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))


def refuse_removals(arguments: Sequence[str]) -> None:
    """~quant would compose, and leave the values of the schema, which no group file and no help text names."""
    for argument in arguments:
        if argument.startswith("~") and not argument.startswith("~hydra"):
            name = argument[1:].partition("=")[0]
            raise UserError(
                f"{argument}: it cannot be removed from the configuration; choose another value, such as {name}=off "
                "for the groups that have it (qat, reest, store, tracking, train)."
            )
