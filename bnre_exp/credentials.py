"""Credentials in the URI of a store: taken out before anything writes the URI down, and given to MLflow by its own
environment variables, which the processes of a sweep inherit.

MLflow reads these for servers; of a database that has a user and no password, the password is put back by
:func:`connectable`, at the moment of the connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from bnre_exp.errors import UserError

USERNAME, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
HIDDEN = "***"

_USER = re.compile(r"([A-Za-z][\w+.-]*)://([^/\s\"]*)@")
_IN_QUERY = re.compile(r"([?&])(password|passwd|pwd|token)=([^&\s'\",}\]]+)", re.IGNORECASE)
_DATABASE = re.compile(r"(postgres(ql)?|mysql|mariadb|mssql|oracle)(\+\w+)?")


def redact(text: str) -> str:
    """The text, with whatever is a credential in a URL replaced by ***."""

    def hide(match: re.Match[str]) -> str:
        user, colon, _ = match[2].partition(":")
        if not _DATABASE.fullmatch(match[1]):  # the user's name alone may be a token
            return f"{match[1]}://{HIDDEN}@"
        return f"{match[1]}://{user}{f':{HIDDEN}' if colon else ''}@"

    return _IN_QUERY.sub(rf"\1\2={HIDDEN}", _USER.sub(hide, text))


def concealed(value: Any) -> Any:
    """:func:`redact` of every text in dicts and lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: concealed(item) for key, item in value.items()}
    return [concealed(item) for item in value] if isinstance(value, (list, tuple)) else value


def take_credentials(uri: str) -> str:
    """The URI without its credentials, which go to MLflow's environment variables. Raises ``UserError``, without
    repeating them, for a URI that cannot be told apart from them."""
    check_readable(uri)
    clean, found = _without(uri)
    os.environ.update(found)
    return clean


def without_credentials(uri: str) -> str:
    """The URI without its credentials, which go nowhere."""
    return _without(uri)[0]


@contextmanager
def lent_credentials(uri: str | None) -> Iterator[str | None]:
    """:func:`take_credentials` for a block; afterwards the environment is as before: they are of this store alone."""
    before = {name: os.environ.get(name) for name in (USERNAME, PASSWORD, TOKEN)}
    try:
        yield take_credentials(uri) if uri else uri
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def arguments_without_credentials(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without those in tracking.uri, which go to MLflow's environment variables."""
    cleaned: list[str] = []
    taken: dict[str, str] = {}
    for argument in arguments:
        if argument.lstrip("+'\"").startswith(("tracking.uri", "tracking=")):
            argument, found = _without(argument)
            for name, secret in found.items():
                _add(taken, name, secret)
        cleaned.append(argument)
    os.environ.update(taken)
    return cleaned


def connectable(uri: str) -> str:
    """The URI of a database with the password of the environment; of anything else, as it is: MLflow reads that."""
    scheme, _, rest = uri.partition("://")
    user, at, place = rest.partition("@")
    password = os.environ.get(PASSWORD)
    if not (_DATABASE.fullmatch(scheme) and at and password) or ":" in user:
        return uri
    return f"{scheme}://{user}:{quote(password, safe='')}@{place}"


def check_readable(uri: str) -> None:
    """Raise ``UserError`` for a URI whose user and password hold what ends them, such as /."""
    if "://" not in uri or uri.startswith(("sqlite:", "file:")):
        return
    try:
        parts = urlsplit(uri)
        clear = ("@" not in uri or "@" in parts.netloc) and (not uri.startswith("http") or parts.port != 0)
    except ValueError:
        clear = False
    if not clear:
        raise UserError(
            f"tracking.uri cannot be read: set user and password by {USERNAME} and {PASSWORD}, or write in them "
            "/ as %2F, @ as %40, : as %3A, # as %23, ? as %3F and % as %25."
        )


def _without(text: str) -> tuple[str, dict[str, str]]:
    """A text with URIs, without their credentials, and these by the name of their environment variable."""
    found: dict[str, str] = {}

    def cut(match: re.Match[str]) -> str:
        (user, _, secret), scheme = match[2].partition(":"), match[1]
        if "${" in match[2]:  # of OmegaConf; what it stands for is taken where it is known
            return match[0]
        if secret and secret != HIDDEN:
            _add(found, PASSWORD, _plain(secret))
        if _DATABASE.fullmatch(scheme):
            return f"{scheme}://{user}@"
        if user and user != HIDDEN:
            _add(found, USERNAME, _plain(user))
        return f"{scheme}://"

    def cut_query(match: re.Match[str]) -> str:
        if match[3] != HIDDEN:
            _add(found, TOKEN if match[2].lower() == "token" else PASSWORD, _plain(match[3]))
        return match[1]

    text = _USER.sub(cut, text)
    if not _IN_QUERY.search(text):
        return text, found
    text = re.sub(r"([?&])&", r"\1", _IN_QUERY.sub(cut_query, text))
    return re.sub(r"[?&](?=$|[\s'\",}\]])", "", text), found


def _add(found: dict[str, str], name: str, secret: str) -> None:
    if found.get(name, secret) != secret:
        raise UserError(
            f"tracking.uri has the credentials of several stores: expected those of one. Set {USERNAME} and {PASSWORD} "
            "for each command instead."
        )
    found[name] = secret


def _plain(secret: str) -> str:
    """As it was before it was written into a URI, and before that into an override of Hydra."""
    return unquote(re.sub(r"\\(.)", r"\1", secret))
