"""The options of an adapter as an operator gives them: `NAME=PATH_OR_REPO`, JSON, or keyword arguments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from vllm_plugin.errors import PrefixServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,255}")


class AdapterOption(NamedTuple):
    """One adapter to serve.

    Args:
        name: The name that requests use.
        path: Folder or Hub repository.
        base_model_name: The served model that `/v1/models` lists as its parent; the first one by default.
    """

    name: str
    path: str
    base_model_name: str | None = None


def parse_adapter(text: str) -> AdapterOption:
    """Parses `NAME=PATH_OR_REPO` or its JSON form.

    Raises:
        PrefixServeError: If it is neither, or the name is invalid.
    """
    option = _parse_json(text) if text.lstrip().startswith("{") else AdapterOption(*text.partition("=")[::2])
    if not option.path:
        raise PrefixServeError(f"expected NAME=PATH_OR_REPO, got {text!r}")
    check_name(option.name)
    return option


def parse_gib(text: str) -> int:
    """Parses a number of GiB and returns it in bytes.

    Raises:
        PrefixServeError: If it is not a number >= 0.
    """
    try:
        num_bytes = float(text) * 2**30
    except ValueError:
        num_bytes = math.nan
    if not 0 <= num_bytes < math.inf:
        raise PrefixServeError(f"expected a number of GiB >= 0, got {text!r}")
    return int(num_bytes)


def check_name(name: str) -> None:
    """Raises `PrefixServeError` if `name` is not a valid name for an adapter."""
    if not _NAME.fullmatch(name):
        raise PrefixServeError(
            f"A prefix adapter's name must be up to 256 letters, digits and, after the first, any of ._/:@+-; got {name!r}."
        )


def check_unique(options: Iterable[AdapterOption]) -> None:
    """Raises `PrefixServeError` if two adapters have the same name."""
    paths: dict[str, str] = {}
    for option in options:
        if option.name in paths:
            raise PrefixServeError(
                f"The prefix adapter name {option.name!r} is given twice, for {paths[option.name]!r} and {option.path!r}; "
                "rename one of them."
            )
        paths[option.name] = option.path


def _parse_json(text: str) -> AdapterOption:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise PrefixServeError(f"invalid JSON ({error}), got {text!r}") from error
    known = set(AdapterOption._fields)
    if not {"name", "path"} <= fields.keys() <= known or not all(
        isinstance(value, str) or (value is None and field == "base_model_name") for field, value in fields.items()
    ):
        raise PrefixServeError(f"expected strings `name`, `path` and, optionally, `base_model_name`, got {text!r}")
    return AdapterOption(**fields)
