"""The options of an adapter as an operator gives them: `NAME=PATH_OR_REPO`, JSON, or keyword arguments.

`NAME=PATH_OR_REPO,draft=PATH_OR_REPO` names a second prefix, for the draft model of speculative decoding.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vllm_plugin.errors import PrefixServeError

_DRAFT = ",draft="
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,255}")

# A file system takes names of 255 bytes, and each of these is one byte. The first excludes "..", hidden folders and options.
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,254}")


class AdapterOption(NamedTuple):
    """One adapter to serve.

    Args:
        name: The name that requests use.
        path: Folder or Hub repository.
        base_model_name: The served model that `/v1/models` lists as its parent; the first one by default.
        draft_path: Folder or Hub repository of a prefix of the same length that was trained on the draft model, if any.
        pinned: Whether it stays in memory; None if the names of the pinned adapters in the engine's config decide.
    """

    name: str
    path: str
    base_model_name: str | None = None
    draft_path: str | None = None
    pinned: bool | None = None


def parse_adapter(text: str) -> AdapterOption:
    """Parses `NAME=PATH_OR_REPO[,draft=PATH_OR_REPO]` or its JSON form.

    Raises:
        PrefixServeError: If it is neither, or the name is invalid.
    """
    option = _parse_json(text) if text.lstrip().startswith("{") else _parse_short(text)
    if not option.path:
        raise PrefixServeError(f"expected NAME=PATH_OR_REPO, got {text!r}")
    if option.draft_path == "":
        raise PrefixServeError(f"expected NAME=PATH_OR_REPO{_DRAFT}PATH_OR_REPO, got {text!r}")
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


def is_name(name: str) -> bool:
    """Returns whether an adapter can have this name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises `PrefixServeError` if `name` is not a valid name for an adapter."""
    if not is_name(name):
        raise PrefixServeError(
            f"A prefix adapter's name must be up to 256 letters, digits and, after the first, any of ._/:@+-; got {name!r}."
        )


def is_folder_name(name: str) -> bool:
    """Returns whether an adapter's name can be that of a folder, and never a path."""
    return _FOLDER_NAME.fullmatch(name) is not None


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


def option_of(name: str, source: str | os.PathLike[str] | Mapping[str, Any]) -> AdapterOption:
    """Returns the option of an adapter that Python code names.

    Args:
        name: The name that requests use.
        source: Folder or Hub repository; or a mapping with the fields `path`, `draft_path` and `pinned`.

    Raises:
        PrefixServeError: If the name or the source is invalid.
    """
    check_name(name)
    fields = source if isinstance(source, Mapping) else {"path": os.fspath(source)}
    draft_path, pinned = fields.get("draft_path"), fields.get("pinned")
    if not {"path"} <= fields.keys() <= {"path", "draft_path", "pinned"} or not isinstance(pinned, bool | None):
        raise PrefixServeError(
            f"The prefix adapter {name!r} needs a path, or a mapping with `path` and, optionally, `draft_path` and `pinned`, "
            f"True or False, got {source!r}."
        )
    return AdapterOption(
        name,
        os.fspath(fields["path"]),
        draft_path=None if draft_path is None else os.fspath(draft_path),
        pinned=pinned,
    )


def _parse_short(text: str) -> AdapterOption:
    name, _, source = text.partition("=")
    path, draft, draft_path = source.rpartition(_DRAFT)
    return AdapterOption(name, path, draft_path=draft_path) if draft else AdapterOption(name, source)


def _parse_json(text: str) -> AdapterOption:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise PrefixServeError(f"invalid JSON ({error}), got {text!r}") from error
    known = set(AdapterOption._fields)
    if not {"name", "path"} <= fields.keys() <= known or not all(
        isinstance(value, bool if field == "pinned" else str)
        or (value is None and field in ("base_model_name", "draft_path"))
        for field, value in fields.items()
    ):
        raise PrefixServeError(
            "expected strings `name`, `path` and, optionally, `base_model_name` and `draft_path`, and true or false as "
            f"`pinned`, got {text!r}"
        )
    return AdapterOption(**fields)
