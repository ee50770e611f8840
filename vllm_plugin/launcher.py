"""`prefix-serve MODEL --prefix-adapter NAME=PATH ...`: `vllm serve MODEL ...`, on CPU builds of vLLM too."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

from vllm_plugin.errors import PrefixServeError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server with vLLM's own command line.

    Args:
        argv: The arguments of `vllm serve`; those of this process by default.
    """
    _answer_for_vllm()
    from vllm_plugin import register

    # Whatever VLLM_PLUGINS says: who calls this command wants the plugin.
    register()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", "serve", *(sys.argv[1:] if argv is None else argv)]
    try:
        vllm_main()
    except PrefixServeError as error:
        sys.exit(f"prefix-serve: error: {error}")


def _answer_for_vllm() -> None:
    """Lets vLLM's command line ask for the version of a distribution `vllm`, which CPU builds go without.

    They are published under other names, and `vllm --version` then fails before it parses anything.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        original = importlib.metadata.version

        def version(distribution_name: str) -> str:
            if distribution_name != "vllm":
                return original(distribution_name)
            import vllm

            return vllm.__version__

        importlib.metadata.version = version


if __name__ == "__main__":
    main()
