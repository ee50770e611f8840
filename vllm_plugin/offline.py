"""Prefix adapters in offline inference: the arguments of `LLM(...)`, and the request that selects an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters.options import check_name, option_of, parse_gib
from vllm_plugin.adapters.sources import check_folders, check_owners
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import CACHE_SIZE, DEVICE_MEMORY, FOLDERS, OWNERS, PINNED, merge, settings
from vllm_plugin.patches.install import install, require

if TYPE_CHECKING:
    from vllm_plugin.adapters.request import PrefixAdapterRequest

__all__ = ["PrefixAdapterRequest", "prefix_adapters", "remove_prefix_adapter"]

# Where an adapter lies; see `option_of`.
Source = str | os.PathLike[str] | Mapping[str, Any]


def prefix_adapters(
    adapters: Mapping[str, Source] | None = None,
    kv_transfer_config: Any = None,
    /,
    *,
    prefix_adapter_device_memory: float | None = None,
    prefix_adapter_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    prefix_adapter_hub: str | Sequence[str] = (),
    prefix_adapter_cache_size: float | None = None,
    prefix_adapter_pinned: str | Sequence[str] = (),
    **more: Source,
) -> dict[str, Any]:
    """Returns the keyword arguments that make `LLM(...)` or `EngineArgs(...)` serve prefix adapters.

    Args:
        adapters: Folder or Hub repository of each adapter by name, for names that are not Python identifiers; or a
            mapping with `path`, and optionally `draft_path`, the prefix of the draft model, and `pinned`, True for one that
            stays in memory. `{}` if requests bring all adapters along.
        kv_transfer_config: Your own KV connector to run beside the prefixes, if any.
        prefix_adapter_device_memory: Device memory for prefixes beside the KV cache, in GiB; 0.5 by default.
        prefix_adapter_dir: Folders whose folders are adapters, found by the names in requests.
        prefix_adapter_hub: Owners or repositories on the Hub, found by `OWNER/name` in requests.
        prefix_adapter_cache_size: Disk space for copies of adapters in remote storage, in GiB; 10 by default.
        prefix_adapter_pinned: Names of adapters that stay in memory, also of those that are found later.
        more: Further adapters by name.

    Raises:
        PrefixServeError: If there is no adapter, a name or the memory is invalid, or the connector cannot be combined.
    """
    install()
    sources = {**(adapters or {}), **more}
    folders = [os.fspath(folder) for folder in _list(prefix_adapter_dir)]
    owners = [str(owner) for owner in _list(prefix_adapter_hub)]
    if not (sources or folders or owners) and adapters is None:
        raise PrefixServeError("`prefix_adapters` needs at least one name=path.")
    check_folders(folders)
    check_owners(owners)
    pinned = [str(name) for name in _list(prefix_adapter_pinned)]
    for name in pinned:
        check_name(name)
    options = [option_of(name, source) for name, source in sources.items()]
    given: dict[str, Any] = {
        FOLDERS: folders,
        OWNERS: owners,
        PINNED: pinned,
        DEVICE_MEMORY: _bytes("prefix_adapter_device_memory", prefix_adapter_device_memory),
        CACHE_SIZE: _bytes("prefix_adapter_cache_size", prefix_adapter_cache_size),
    }
    ours = settings(
        (option._asdict() for option in options),
        **{name: value for name, value in given.items() if value not in (None, [])},
    )
    return {"kv_transfer_config": merge(kv_transfer_config, ours)}


def remove_prefix_adapter(engine: Any, name: str) -> None:
    """Removes an adapter from a running engine. Requests that have it finish with it.

    Args:
        engine: vLLM's `LLM`, `LLMEngine` or `AsyncLLM`.
        name: The name of the adapter.

    Raises:
        PrefixServeError: If the engine has no adapter of this name.
    """
    from vllm_plugin.adapters.runtime_loading import remove

    remove(name, getattr(engine, "llm_engine", engine).vllm_config)


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, os.PathLike)) else list(value)


def _bytes(option: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    try:
        return parse_gib(str(gib))
    except PrefixServeError as error:
        raise PrefixServeError(f"`{option}`: {error}.") from error


def __getattr__(name: str) -> Any:
    # On use only: it imports vLLM, which reads its environment variables then.
    if name == "PrefixAdapterRequest":
        from vllm_plugin.adapters.request import PrefixAdapterRequest

        # Without the patches, an engine would take the request for a LoRA request.
        require(server=False)
        return PrefixAdapterRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
