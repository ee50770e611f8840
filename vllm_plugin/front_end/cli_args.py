"""The options of `vllm serve`: `--prefix-adapter NAME=PATH_OR_REPO ...` and what goes with it."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_plugin.errors import PrefixServeError

# Any of them means that a server has prefixes.
OPTIONS = ("prefix_adapter", "enable_prefix_adapters", "prefix_adapter_warmup", "prefix_adapter_device_memory")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,255}")


class AdapterOption(NamedTuple):
    """One adapter, as the operator wrote it.

    Args:
        name: What requests call it.
        path: Folder or Hub repository.
        base_model_name: The served model that `/v1/models` shows as its parent; the first one by default.
    """

    name: str
    path: str
    base_model_name: str | None = None


class SharedFolder(str):
    """The folder of the registry, on its way to the other API server processes of a server.

    Such a process gets the parsed options, and reads them before it loads plugins: unpickling this attaches ours.
    """

    def __reduce__(self) -> tuple[Callable[[str], SharedFolder], tuple[str]]:
        return restore_folder, (str(self),)


def restore_folder(folder: str) -> SharedFolder:
    """Unpickles a `SharedFolder`."""
    from vllm_plugin import register

    register()
    return SharedFolder(folder)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds our options to vLLM's engine arguments; adding them twice changes nothing."""
    if "--prefix-adapter" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="Prefix adapters", description="Trained key/value prefixes served beside the base model."
    )
    group.add_argument(
        "--prefix-adapter",
        metavar="NAME=PATH_OR_REPO",
        nargs="+",
        action="extend",
        type=parse_adapter,
        default=None,
        help="Prefix adapters to serve, each a folder or a Hub repository, `owner/name[@revision]`; a request picks one "
        'with "model": "NAME". Or in JSON, as for --lora-modules: \'{"name": "NAME", "path": "PATH_OR_REPO", '
        '"base_model_name": "MODEL"}\'.',
    )
    group.add_argument(
        "--enable-prefix-adapters",
        action="store_true",
        help="Starts without adapters, too: they come at run time, by POST /v1/load_prefix_adapter, which the environment "
        "variable PREFIX_SERVE_ALLOW_RUNTIME_UPDATING=1 switches on.",
    )
    group.add_argument(
        "--prefix-adapter-warmup",
        action="store_true",
        help="Puts every prefix into the cache before the server is ready, and each one that is loaded later before its "
        "first request.",
    )
    group.add_argument(
        "--prefix-adapter-device-memory",
        metavar="GIB",
        type=parse_gib,
        default=None,
        help="What prefixes may take of each device's memory beside the KV cache, ready to be copied into it; others wait "
        "in eight times as much memory of the host. Not part of --gpu-memory-utilization. 0.5 by default.",
    )


def parse_adapter(text: str) -> AdapterOption:
    """Reads `NAME=PATH_OR_REPO` or its JSON form, for argparse.

    Raises:
        argparse.ArgumentTypeError: If it is neither, or the name is not usable.
    """
    option = _parse_json(text) if text.lstrip().startswith("{") else AdapterOption(*text.partition("=")[::2])
    if not option.path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH_OR_REPO, got {text!r}")
    try:
        check_name(option.name)
    except PrefixServeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return option


def parse_gib(text: str) -> int:
    """Reads GiB as a number of bytes, for argparse.

    Raises:
        argparse.ArgumentTypeError: If it is no number >= 0.
    """
    try:
        num_bytes = float(text) * 2**30
    except ValueError:
        num_bytes = math.nan
    if not 0 <= num_bytes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of GiB >= 0, got {text!r}")
    return int(num_bytes)


def check_name(name: str) -> None:
    """Raises `PrefixServeError` if `name` cannot name an adapter."""
    if not _NAME.fullmatch(name):
        raise PrefixServeError(
            f"A prefix adapter's name must be up to 256 letters, digits and, after the first, any of ._/:@+-; got {name!r}."
        )


def check_unique(options: Iterable[AdapterOption]) -> None:
    """Raises `PrefixServeError` if a name comes twice."""
    paths: dict[str, str] = {}
    for option in options:
        if option.name in paths:
            raise PrefixServeError(
                f"The prefix adapter name {option.name!r} is given twice, for {paths[option.name]!r} and {option.path!r}."
            )
        paths[option.name] = option.path


def _parse_json(text: str) -> AdapterOption:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON ({error}), got {text!r}") from error
    known = set(AdapterOption._fields)
    if not {"name", "path"} <= fields.keys() <= known or not all(
        isinstance(value, str) or (value is None and field == "base_model_name") for field, value in fields.items()
    ):
        raise argparse.ArgumentTypeError(
            f"expected strings `name` and `path`, and `base_model_name` if need be, got {text!r}"
        )
    return AdapterOption(**fields)
