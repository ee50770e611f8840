"""Serves trained key/value prefixes on vLLM beside the base model, one prefix per request.

`register` is vLLM's plugin entry point (`vllm.general_plugins`). vLLM calls it once in each of its processes, so
importing this module must stay cheap. Offline use:

    llm = LLM(model=BASE, **prefix_adapters(name="path-or-repo"))
    llm.generate(prompts, params, lora_request=PrefixAdapterRequest("name"))
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_plugin.offline import PrefixAdapterRequest, prefix_adapters, remove_prefix_adapter

__all__ = ["PrefixAdapterRequest", "prefix_adapters", "register", "remove_prefix_adapter"]


def register() -> None:
    """Attaches the plugin to vLLM. Calling it again has no effect."""
    from vllm_plugin.patches.install import install

    install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("vllm") is None:
        from vllm_plugin.errors import NO_VLLM

        raise ImportError(NO_VLLM)
    return getattr(import_module("vllm_plugin.offline"), name)
