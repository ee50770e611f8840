"""Prefix adapters in offline inference: the arguments of `LLM(...)`, and the request that selects an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters.options import option_of, parse_gib
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import DEVICE_MEMORY, merge, settings
from vllm_plugin.patches.install import install, require

if TYPE_CHECKING:
    from vllm_plugin.adapters.request import PrefixAdapterRequest

__all__ = ["PrefixAdapterRequest", "prefix_adapters"]

# Where an adapter lies; see `option_of`.
Source = str | os.PathLike[str] | Mapping[str, str]


def prefix_adapters(
    adapters: Mapping[str, Source] | None = None,
    kv_transfer_config: Any = None,
    /,
    *,
    prefix_adapter_device_memory: float | None = None,
    **more: Source,
) -> dict[str, Any]:
    """Returns the keyword arguments that make `LLM(...)` or `EngineArgs(...)` serve prefix adapters.

    Args:
        adapters: Folder or Hub repository of each adapter by name, for names that are not Python identifiers; or a
            mapping with `path` and `draft_path`, the prefix of the draft model. `{}` if requests bring all adapters along.
        kv_transfer_config: Your own KV connector to run beside the prefixes, if any.
        prefix_adapter_device_memory: Device memory for prefixes beside the KV cache, in GiB; 0.5 by default.
        more: Further adapters by name.

    Raises:
        PrefixServeError: If there is no adapter, a name or the memory is invalid, or the connector cannot be combined.
    """
    install()
    sources = {**(adapters or {}), **more}
    if not sources and adapters is None:
        raise PrefixServeError("`prefix_adapters` needs at least one name=path.")
    options = [option_of(name, source) for name, source in sources.items()]
    memory: dict[str, int] = {}
    if prefix_adapter_device_memory is not None:
        try:
            memory[DEVICE_MEMORY] = parse_gib(str(prefix_adapter_device_memory))
        except PrefixServeError as error:
            raise PrefixServeError(f"`prefix_adapter_device_memory`: {error}.") from error
    ours = settings((option._asdict() for option in options), **memory)
    return {"kv_transfer_config": merge(kv_transfer_config, ours)}


def __getattr__(name: str) -> Any:
    # On use only: it imports vLLM, which reads its environment variables then.
    if name == "PrefixAdapterRequest":
        from vllm_plugin.adapters.request import PrefixAdapterRequest

        # Without the patches, an engine would take the request for a LoRA request.
        require(server=False)
        return PrefixAdapterRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
