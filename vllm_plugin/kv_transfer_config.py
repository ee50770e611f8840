"""The plugin's settings in vLLM's `KVTransferConfig`, the part of its config that reaches every process.

The command line and `prefix_adapters` write the requested adapters there (`ADAPTERS`). When the engine's config is
created, these adapters are opened and added to the server's registry, and the settings then name the registry's folder
(`REGISTRY`). vLLM is imported on use only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_plugin.composable_connectors import check_composable, takes_over

CONNECTOR = "PrefixConnector"
CONNECTOR_MODULE = "vllm_plugin.connector"
# Keys of the connector's extra config: the adapters to open, the registry's folder, which adapters to warm up (True for all).
# `ADAPTERS` is also the key of a request's packed `PrefixSpec` in its KV transfer parameters.
ADAPTERS, REGISTRY, WARMUP = "prefix_adapters", "prefix_registry", "prefix_adapter_warmup"
# Where adapters are found by the names in requests: folders, and owners on the Hub. The size of the cache of remote adapters.
FOLDERS, OWNERS, CACHE_SIZE = "prefix_adapter_dir", "prefix_adapter_hub", "prefix_adapter_cache_size"
# Names of adapters that stay in memory, also of those that are found later.
PINNED = "prefix_adapter_pinned"
# Device memory for prefixes, in bytes. On a GPU the KV cache leaves it free.
DEVICE_MEMORY, DEFAULT_DEVICE_MEMORY = "prefix_device_memory", 512 << 20
# Whether the operator's own connector takes over what another server has prefilled; ours cannot see it.
HANDOVER = "prefix_handover"


def settings(adapters: Iterable[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Returns the extra config of our connector before the engine's config is created.

    Args:
        adapters: The fields of each `AdapterOption`.
        more: Further settings.
    """
    return {ADAPTERS: [dict(adapter) for adapter in adapters], **more}


def merge(other: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a `KVTransferConfig` with our connector, followed by the operator's own connector if there is one.

    Ours comes first because vLLM takes the first connector with a hit, and only ours has every prefix. Where another one
    takes over a whole prompt from the server that prefilled it, ours stands back.

    Args:
        other: The operator's `KVTransferConfig`, its fields, or None.
        settings: The extra config of our connector.

    Raises:
        PrefixServeError: If the operator's connector cannot run beside prefixes.
    """
    from vllm.config import KVTransferConfig

    own_settings = dict(settings)
    ours: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": own_settings,
    }
    if isinstance(other, Mapping):
        other = KVTransferConfig(**other)
    if other is None or other.kv_connector is None:
        return KVTransferConfig(**ours)
    extra: dict[str, Any] = {}
    if other.kv_connector == "MultiConnector":
        extra = other.kv_connector_extra_config
        children = list(extra.get("connectors", []))
    else:
        fields = {field.name: getattr(other, field.name) for field in dataclasses.fields(other)}
        children = [{name: value for name, value in fields.items() if name != "engine_id"}]
    check_composable(children)
    own_settings |= {HANDOVER: True} if any(map(takes_over, children)) else {}
    # What another server has prefilled is the whole prompt, and a connector that keeps blocks may have a part of it.
    children.sort(key=takes_over, reverse=True)
    return dataclasses.replace(
        other,
        kv_connector="MultiConnector",
        kv_connector_module_path=None,
        kv_role="kv_consumer" if other.kv_role == "kv_consumer" else "kv_both",
        kv_connector_extra_config={**extra, "connectors": [ours, *children]},
        # "recompute" would run the placeholders of a prefix as text.
        kv_load_failure_policy="fail",
    )


def settings_in(kv_transfer_config: Any) -> Mapping[str, Any] | None:
    """Returns the extra config of our connector in a `KVTransferConfig`; None if the connector is not there."""
    # Called for each request, so the common case comes first.
    if kv_transfer_config is None:
        return None
    extra: Mapping[str, Any] = kv_transfer_config.kv_connector_extra_config
    if kv_transfer_config.kv_connector == CONNECTOR:
        return extra
    children = extra.get("connectors", []) if kv_transfer_config.kv_connector == "MultiConnector" else []
    return next(
        (child.get("kv_connector_extra_config", {}) for child in children if child.get("kv_connector") == CONNECTOR),
        None,
    )


def replace_settings(kv_transfer_config: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a copy of a `KVTransferConfig` that has our connector, with another extra config for it."""
    if kv_transfer_config.kv_connector == CONNECTOR:
        return dataclasses.replace(kv_transfer_config, kv_connector_extra_config=dict(settings))
    children = [
        {**child, "kv_connector_extra_config": dict(settings)} if child.get("kv_connector") == CONNECTOR else child
        for child in kv_transfer_config.kv_connector_extra_config["connectors"]
    ]
    extra = {**kv_transfer_config.kv_connector_extra_config, "connectors": children}
    return dataclasses.replace(kv_transfer_config, kv_connector_extra_config=extra)
