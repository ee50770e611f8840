"""Adapters that come while an engine runs: into the table of its server, or, offline, by a request that names their path."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from vllm_plugin.adapters.loading import check_served_names, logger, open_adapter
from vllm_plugin.adapters.registry import Adapter, Registry, registry_in
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.startup_log import report
from vllm_plugin.errors import PrefixServeError, request_error_type
from vllm_plugin.front_end.cli_args import AdapterOption, check_name

# Requests that name one path at a time read it once.
_turn = threading.Lock()
# Of an error message.
_MAX_NAMES = 20


def publish(adapter: Adapter, registry: Registry, vllm_config: Any, *, replace: bool) -> None:
    """Puts an adapter that was checked into the table, and tells the log.

    Raises:
        NameTakenError: If it has the name of another, and is not meant to replace it.
    """
    registry.add([adapter], replace=replace)
    logger.info("Loaded prefix adapter: name '%s', path '%s'", adapter.spec.name, adapter.spec.source)
    if (block_size := registry.block_size()) is not None:
        report([adapter], block_size, vllm_config.model_config.dtype.itemsize)


def bound(requests: Sequence[Any], vllm_config: Any) -> Sequence[Any]:
    """Returns the `lora_request` of each prompt of one call, those that load something with what they have loaded.

    Raises:
        PrefixRequestError: If there is no such adapter, or it cannot be served.
    """
    specs: dict[tuple[str, str, bool], PrefixSpec] = {}

    def bind(request: Any) -> Any:
        if not isinstance(request, PrefixAdapterRequest) or not (request.lora_path or request.load_inplace):
            return request
        key = request.lora_name, request.lora_path, request.load_inplace
        if key not in specs:
            specs[key] = adapter_of(request, vllm_config)
        return PrefixAdapterRequest(request.lora_name, spec=specs[key])

    return [bind(request) for request in requests]


def adapter_of(request: PrefixAdapterRequest, vllm_config: Any) -> PrefixSpec:
    """Returns the adapter that a request stands for, loading it first if that is what the request says.

    Raises:
        PrefixRequestError: If there is no such adapter, or it cannot be served.
    """
    if request.spec is not None:
        return request.spec
    name, registry = request.lora_name, registry_in(vllm_config.kv_transfer_config)
    error = request_error_type()
    if registry is None:
        raise error(
            f"The prefix adapter {name!r} does not exist; this engine has: none; start it with "
            "`LLM(..., **prefix_adapters(name=path))`."
        )
    loads = request.lora_path or request.load_inplace
    if not loads and (known := registry.get(name)) is not None:
        return known.spec
    if not loads:
        raise error(_unknown(name, registry))
    with _turn:
        return _load(request, registry, vllm_config).spec


def names_in(registry: Registry) -> str:
    """Lists the adapters of an engine for a message, or as many of them as one can read."""
    names = [adapter.spec.name for adapter in registry.adapters()]
    return ", ".join([*names[:_MAX_NAMES], "..."] if len(names) > _MAX_NAMES else names) or "none"


def _unknown(name: str, registry: Registry) -> str:
    return (
        f"The prefix adapter {name!r} does not exist; this engine has: {names_in(registry)}; give the request the path of "
        "the adapter, as `lora_path`, to load it."
    )


def _load(request: PrefixAdapterRequest, registry: Registry, vllm_config: Any) -> Adapter:
    name, known, error = request.lora_name, registry.get(request.lora_name), request_error_type()
    if known is not None and not request.load_inplace:
        if request.lora_path == known.spec.source or _real(request.lora_path) == known.spec.path:
            return known
        raise error(
            f"The prefix adapter {name!r} was loaded from {known.spec.source!r}; set `load_inplace=True` to replace it by "
            f"the one in {request.lora_path!r}, or choose another name."
        )
    path = request.lora_path or (known.spec.source if known is not None else "")
    if not path:
        raise error(_unknown(name, registry))
    try:
        check_name(name)
        check_served_names([name], [vllm_config.model_config.served_model_name])
        option = AdapterOption(name, path, None if known is None else known.base_model_name)
        adapter = open_adapter(option, vllm_config, registry.layers())
    except PrefixServeError as refusal:
        raise error(str(refusal)) from refusal
    publish(adapter, registry, vllm_config, replace=request.load_inplace)
    return adapter


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
