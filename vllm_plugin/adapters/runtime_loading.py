"""Adapters that are loaded while an engine runs: through a server's endpoints or, offline, by a request with a path."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from vllm_plugin.adapters.adapter_kinds import is_prefix_path
from vllm_plugin.adapters.loading import open_adapter, verify_adapter
from vllm_plugin.adapters.options import AdapterOption, check_name
from vllm_plugin.adapters.registry import Adapter, NameTakenError, Registry, registry_in
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.resolver import Resolver
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.startup_log import log_loaded
from vllm_plugin.adapters.validation import check_served_names
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.request_errors import PrefixRequestError

# Held while loading, so that concurrent requests with one path read it once.
_load_lock = threading.Lock()
_resolvers: dict[Registry, Resolver] = {}
# An error message lists at most this many names.
_MAX_NAMES = 20


def publish(adapter: Adapter, registry: Registry, vllm_config: Any, *, replace: bool) -> None:
    """Adds a checked adapter to the registry, and logs it.

    Raises:
        NameTakenError: If another adapter has its name, and `replace` is off.
    """
    registry.add([adapter], replace=replace)
    log_loaded(adapter, registry.block_size(), vllm_config)


def load_requested(requests: Sequence[Any], vllm_config: Any) -> Sequence[Any]:
    """Loads the adapters that the requests of one call name by path, each of them once.

    Args:
        requests: The `lora_request` of each prompt.
        vllm_config: The engine's config.

    Returns:
        The requests. Those that loaded an adapter hold its spec.

    Raises:
        PrefixRequestError: If there is no such adapter, or it cannot be served.
    """
    specs: dict[tuple[str, str, str, bool], PrefixSpec] = {}

    def with_spec(request: Any) -> Any:
        request = as_prefix_request(request, vllm_config)
        if not isinstance(request, PrefixAdapterRequest) or request.spec is not None:
            return request
        key = request.lora_name, request.lora_path, request.draft_path, request.load_inplace
        if key not in specs:
            specs[key] = adapter_of(request, vllm_config)
        return PrefixAdapterRequest(request.lora_name, spec=specs[key])

    return [with_spec(request) for request in requests]


def as_prefix_request(request: Any, vllm_config: Any) -> Any:
    """Returns the request for a prefix that a `LoRARequest` names by its folder; any other request as it is."""
    if request is None or isinstance(request, PrefixAdapterRequest) or not request.lora_path:
        return request
    registry = registry_in(vllm_config.kv_transfer_config)
    if registry is None:
        return request
    known = registry.get(request.lora_name)
    if not (known is not None and _came_from(known.spec, request.lora_path)) and not is_prefix_path(request.lora_path):
        return request
    return PrefixAdapterRequest(
        request.lora_name, lora_path=request.lora_path, load_inplace=getattr(request, "load_inplace", False)
    )


def adapter_of(request: PrefixAdapterRequest, vllm_config: Any) -> PrefixSpec:
    """Returns the adapter of a request, and loads it first if the request asks for it.

    Raises:
        PrefixRequestError: If there is no such adapter, or it cannot be served.
    """
    if request.spec is not None:
        return request.spec
    name, registry = request.lora_name, registry_in(vllm_config.kv_transfer_config)
    if registry is None:
        raise PrefixRequestError(
            f"The prefix adapter {name!r} does not exist; this engine has: none; start it with "
            "`LLM(..., **prefix_adapters(name=path))`."
        )
    if request.lora_path or request.load_inplace:
        with _load_lock:
            return _load(request, registry, vllm_config).spec
    try:
        adapter = resolver_of(registry, vllm_config).resolve(name)
    except PrefixServeError as error:
        raise PrefixRequestError(str(error)) from error
    if adapter is None:
        raise PrefixRequestError(_unknown(name, registry))
    return adapter.spec


def resolver_of(registry: Registry, vllm_config: Any) -> Resolver:
    """Returns what finds the adapters of an engine in this process."""
    with _load_lock:
        if registry not in _resolvers:
            _resolvers[registry] = Resolver(registry, vllm_config)
        return _resolvers[registry]


def remove(name: str, vllm_config: Any) -> None:
    """Removes an adapter of a running engine. Requests that have it keep it.

    Raises:
        PrefixServeError: If there is none of this name.
    """
    registry = registry_in(vllm_config.kv_transfer_config)
    try:
        if registry is None:
            raise KeyError(name)
        registry.remove(name)
    except KeyError as error:
        has = "none" if registry is None else names_in(registry)
        raise PrefixServeError(f"The prefix adapter {name!r} cannot be removed; this engine has: {has}.") from error


def names_in(registry: Registry) -> str:
    """Returns the names of an engine's adapters for a message, cut to a readable length."""
    names = [adapter.spec.name for adapter in registry.adapters()]
    return ", ".join([*names[:_MAX_NAMES], "..."] if len(names) > _MAX_NAMES else names) or "none"


def _unknown(name: str, registry: Registry) -> str:
    return (
        f"The prefix adapter {name!r} does not exist; this engine has: {names_in(registry)}; give the request the path of "
        "the adapter, as `lora_path`, to load it."
    )


def _load(request: PrefixAdapterRequest, registry: Registry, vllm_config: Any) -> Adapter:
    name, known = request.lora_name, registry.get(request.lora_name)
    if known is not None and not request.load_inplace:
        if _came_from(known.spec, request.lora_path) and _came_from(known.spec.draft, request.draft_path):
            return known if known.is_verified else _verified(known, registry, vllm_config)
        raise PrefixRequestError(
            f"The prefix adapter {name!r} was loaded from {known.spec.source!r}; set `load_inplace=True` to replace it by "
            f"the one in {request.lora_path!r}, or choose another name."
        )
    path, draft_path = request.lora_path, request.draft_path
    if not path and known is not None:
        path = known.spec.source
        draft_path = draft_path or (known.spec.draft.source if known.spec.draft is not None else "")
    if not path:
        raise PrefixRequestError(_unknown(name, registry))
    try:
        check_name(name)
        check_served_names([name], [vllm_config.model_config.served_model_name])
        base_model_name, pinned = (None, None) if known is None else (known.base_model_name, known.spec.pinned)
        option = AdapterOption(name, path, base_model_name, draft_path or None, pinned)
        adapter = open_adapter(option, vllm_config, registry)
    except PrefixServeError as error:
        raise PrefixRequestError(str(error)) from error
    try:
        publish(adapter, registry, vllm_config, replace=request.load_inplace)
    except NameTakenError:
        # Another engine of this server was faster.
        return _load(request, registry, vllm_config)
    return adapter


def _verified(adapter: Adapter, registry: Registry, vllm_config: Any) -> Adapter:
    try:
        verified = verify_adapter(adapter, vllm_config, registry)
    except PrefixServeError as error:
        raise PrefixRequestError(str(error)) from error
    registry.exchange(adapter, verified)
    return verified


def _came_from(spec: PrefixSpec | None, path: str) -> bool:
    if spec is None:
        return not path
    return path == spec.source or os.path.realpath(os.path.expanduser(path)) == spec.path
