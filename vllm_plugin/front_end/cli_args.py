"""The options of `vllm serve`: `--prefix-adapter NAME=PATH_OR_REPO ...` and those that go with it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TypeVar

from vllm_plugin.adapters import options
from vllm_plugin.errors import PrefixServeError

# A server with any of these options serves prefixes.
OPTIONS = (
    *("prefix_adapter", "enable_prefix_adapters", "prefix_adapter_dir", "prefix_adapter_hub"),
    *("prefix_adapter_warmup", "prefix_adapter_pinned", "prefix_adapter_device_memory", "prefix_adapter_cache_size"),
)
_T = TypeVar("_T")


def _argument_type(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Makes a type for argparse, which shows the message of no other error than its own."""

    @functools.wraps(parse)
    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except PrefixServeError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


parse_adapter = _argument_type(options.parse_adapter)
parse_gib = _argument_type(options.parse_gib)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds our options to vLLM's engine arguments. Adding them again has no effect."""
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
        help="Prefix adapters to serve. Each is a folder, a Hub repository, `owner/name[@revision]`, or an address of remote storage, "
        "such as `s3://bucket/name`; requests select one "
        'with "model": "NAME". The JSON form of --lora-modules works as well: \'{"name": "NAME", "path": "PATH_OR_REPO", '
        '"base_model_name": "MODEL", "pinned": true}\'. NAME=PATH_OR_REPO,draft=PATH_OR_REPO, in JSON "draft_path", adds a prefix for the '
        "draft model of --speculative-config.",
    )
    group.add_argument(
        "--enable-prefix-adapters",
        action="store_true",
        help="Enable prefix adapters without naming one. They are loaded at run time by POST /v1/load_prefix_adapter, which "
        "the environment variable PREFIX_SERVE_ALLOW_RUNTIME_UPDATING=1 enables.",
    )
    group.add_argument(
        "--prefix-adapter-dir",
        metavar="DIR",
        nargs="+",
        action="extend",
        default=None,
        help="Folders of prefix adapters. A request for a name that is a folder in one of them loads it; new, replaced and removed "
        "folders are noticed. A folder may be one of remote storage, such as `s3://bucket/adapters`.",
    )
    group.add_argument(
        "--prefix-adapter-hub",
        metavar="OWNER",
        nargs="+",
        action="extend",
        default=None,
        help="Owners on the Hub, or single repositories. A request for `OWNER/name` loads this repository.",
    )
    group.add_argument(
        "--prefix-adapter-cache-size",
        metavar="GIB",
        type=parse_gib,
        default=None,
        help="Disk space for copies of adapters in remote storage, in GiB. Default: 10.",
    )
    group.add_argument(
        "--prefix-adapter-warmup",
        metavar="NAME",
        nargs="*",
        default=None,
        help="Load these prefixes into the KV cache before the server is ready. Without names: every prefix, and every adapter "
        "that is loaded later before its first request.",
    )
    group.add_argument(
        "--prefix-adapter-pinned",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=None,
        help="Keep these prefixes in memory: the others make room first, on the device and in the KV cache. They may be adapters "
        "that are found or loaded later.",
    )
    group.add_argument(
        "--prefix-adapter-device-memory",
        metavar="GIB",
        type=parse_gib,
        default=None,
        help="Memory per device for prefixes outside the KV cache, in GiB. Other prefixes stay in up to eight times as much "
        "host memory. On a GPU the KV cache gets that much less, unless --kv-cache-memory-bytes sets it. Default: 0.5.",
    )
