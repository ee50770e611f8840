"""Serves trained key/value prefixes on vLLM, one per request, beside the base model.

`register` is vLLM's plugin entry point (`vllm.general_plugins`): vLLM calls it once in each of its processes, so this
module imports nothing heavy. Offline use:

    llm = LLM(model=BASE, **prefix_adapters(name="path-or-repo"))
    llm.generate(prompts, params, lora_request=PrefixAdapterRequest("name"))
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_plugin.adapters.request import PrefixAdapterRequest
    from vllm_plugin.adapters.spec import prefix_adapters

__all__ = ["PrefixAdapterRequest", "prefix_adapters", "register"]


def register() -> None:
    """Attaches the plugin to vLLM; calling it again changes nothing."""
    from vllm_plugin.patches.install import install

    install()


def __getattr__(name: str) -> Any:
    if name in __all__ and find_spec("vllm") is None:
        from vllm_plugin.errors import NO_VLLM

        raise ImportError(NO_VLLM)
    if name == "prefix_adapters":
        from vllm_plugin.adapters.spec import prefix_adapters

        return prefix_adapters
    if name == "PrefixAdapterRequest":
        from vllm_plugin.adapters.request import PrefixAdapterRequest
        from vllm_plugin.patches.install import require

        # An engine without prefixes would take it for a LoRA.
        require(server=False)
        return PrefixAdapterRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
