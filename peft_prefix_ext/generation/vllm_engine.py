"""Prefixes of an offline vLLM engine that is running: one more, another in place of one, and requests that name them.

One of the two modules of this package that know the serving half, and on use only: it imports without vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def is_vllm_available() -> bool:
    """Returns whether vLLM is installed, without importing it."""
    return find_spec("vllm") is not None


def engine_arguments(prefixes: dict[str, str], device_memory: float | None = None) -> dict[str, Any]:
    """Returns the keyword arguments that make `LLM(...)` serve prefixes.

    Args:
        prefixes: Folder of each prefix by name.
        device_memory: Memory for them beside the cache in GiB, 0.5 by default.

    Raises:
        ImportError: If vLLM is not installed.
    """
    from vllm_plugin import prefix_adapters  # without vLLM, this says what to install

    return prefix_adapters(prefixes, prefix_adapter_device_memory=device_memory)


def load_prefix(llm: Any, name: str, folder: str | Path) -> None:
    """Loads a prefix into an engine under a name, in place of the one that has this name.

    Raises:
        ValueError: If there is no prefix in the folder, or it cannot be served on this model.
    """
    from vllm_plugin import PrefixAdapterRequest
    from vllm_plugin.adapters.runtime_loading import adapter_of

    # At once: with the next request, it would be late to say what is wrong with the folder.
    request = PrefixAdapterRequest(name, lora_path=str(folder), load_inplace=True)
    adapter_of(request, llm.llm_engine.vllm_config)


def request_of(name: str | None) -> Any:
    """Returns what `LLM.generate` takes as `lora_request` for a prefix, or for the base model alone."""
    from vllm_plugin import PrefixAdapterRequest

    return None if name is None else PrefixAdapterRequest(name)
