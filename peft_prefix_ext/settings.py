"""Dataclasses whose fields are options of a command as well: a help text, and limits that are checked."""

from __future__ import annotations

import argparse
from dataclasses import field, fields
from typing import Any

_TYPES = {"int": int, "float": float, "str": str}


def setting(default: Any, help: str, *, least: int | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """Returns a field of a dataclass of settings.

    Args:
        default: The default value.
        help: What it does, as the help of the command says it.
        least: The least integer that it may be, if it is one.
        choices: The values that it may have, if these are few.
    """
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def check_settings(settings: Any) -> None:
    """Raises `ValueError` if a field of `settings` is not what its `setting` allows. `None` is allowed where it is the default."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value is None and each.default is None:
            continue
        least, choices = each.metadata["least"], each.metadata["choices"]
        if least is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{each.name}` must be an integer >= {least}, got {value!r}.")
        if choices is not None and value not in choices:
            raise ValueError(f"`{each.name}` must be one of {choices}, got {value!r}.")


def add_settings(parser: argparse.ArgumentParser, kind: type, title: str = "settings") -> None:
    """Adds an option for each field of a dataclass of settings, such as `--batch-size` or `--batch_size` for `batch_size`."""
    group = parser.add_argument_group(title)
    for each in fields(kind):
        name = each.name
        flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        kwargs: dict[str, Any] = {"default": each.default, "dest": name}
        if str(each.type) == "bool":
            kwargs["action"] = argparse.BooleanOptionalAction if each.default else "store_true"
        else:
            choices = each.metadata["choices"]
            kwargs |= {"type": _TYPES[str(each.type).removesuffix(" | None")], "choices": choices}
            kwargs["metavar"] = None if choices else "TEXT" if kwargs["type"] is str else "N"
        shown = "" if each.default is None or each.default is False else " (default: %(default)s)"
        group.add_argument(*flags, help=each.metadata["help"] + shown, **kwargs)


def settings_of(kind: type, args: argparse.Namespace) -> Any:
    """Returns the settings that were given by the options of `add_settings`."""
    return kind(**{each.name: getattr(args, each.name) for each in fields(kind)})
