"""The `--prefix-adapter NAME=PATH_OR_REPO ...` option of `vllm serve`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_plugin.errors import PrefixServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]*")
# vLLM applies an adapter named after a part of a chat message ("text", "image_url", ...) to requests for the base
# model that hold such a part.
_RESERVED = frozenset(
    {"audio", "file", "image", "input", "output", "prompt", "refusal", "text", "thinking", "tool", "video", "vision"}
)


class AdapterOption(NamedTuple):
    """One `NAME=PATH_OR_REPO` of the command line."""

    name: str
    source: str

    def __reduce__(self) -> tuple[Callable[..., AdapterOption], tuple[str, str]]:
        return restore_option, (self.name, self.source)


def restore_option(name: str, source: str) -> AdapterOption:
    """Unpickles an option, and attaches the plugin.

    With several API servers vLLM spawns processes that get the parsed options, and reads them before it loads plugins.
    """
    from vllm_plugin import register

    register()
    return AdapterOption(name, source)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--prefix-adapter` to vLLM's engine arguments; adding it twice changes nothing."""
    if "--prefix-adapter" in parser._option_string_actions:
        return
    parser.add_argument_group(
        title="Prefix adapters", description="Trained key/value prefixes served beside the base model."
    ).add_argument(
        "--prefix-adapter",
        metavar="NAME=PATH_OR_REPO",
        nargs="+",
        action="extend",
        type=parse_adapter,
        default=None,
        help='Prefix adapters to serve, each a folder or a Hub repository; a request picks one with "model": "NAME".',
    )


def parse_adapter(text: str) -> AdapterOption:
    """Splits `NAME=PATH_OR_REPO`, for argparse.

    Raises:
        argparse.ArgumentTypeError: If it is not of that form or the name is not usable.
    """
    name, separator, source = text.partition("=")
    if not separator or not source:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH_OR_REPO, got {text!r}")
    try:
        check_name(name)
    except PrefixServeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return AdapterOption(name, source)


def check_name(name: str) -> None:
    """Raises `PrefixServeError` if `name` cannot name an adapter."""
    if not _NAME.fullmatch(name):
        raise PrefixServeError(
            f"A prefix adapter's name must be letters, digits and any of ._/:@+- after the first, got {name!r}."
        )
    if name in _RESERVED:
        raise PrefixServeError(
            f"{name!r} cannot name a prefix adapter: vLLM reads it as a kind of message content; choose another name."
        )


def as_mapping(adapters: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Turns parsed pairs into name -> source.

    Raises:
        PrefixServeError: If a name comes twice.
    """
    sources: dict[str, str] = {}
    for name, source in adapters:
        if name in sources:
            raise PrefixServeError(
                f"The prefix adapter name {name!r} is given twice, for {sources[name]!r} and {source!r}."
            )
        sources[name] = source
    return sources
