"""How adapters travel inside a vLLM config: as the extra config of a KV connector, the one part every process sees.

The command line writes there what the operator asked for (`ADAPTERS`). When the engine's config is made, `store.py` opens
these adapters and puts them into the registry of the server, and the extra config then says where that is (`REGISTRY`).
vLLM is imported on use only.
"""

from __future__ import annotations

import dataclasses
import functools
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cli_args import AdapterOption, check_name, parse_gib

CONNECTOR = "PrefixConnector"
CONNECTOR_MODULE = "vllm_plugin.connector"
# Of the extra config: adapters to open, the folder of the registry, whether to put each into the cache at the start.
# `ADAPTERS` is also where a request's KV transfer parameters hold its `PrefixSpec`, packed.
ADAPTERS, REGISTRY, WARMUP = "prefix_adapters", "prefix_registry", "prefix_adapter_warmup"
# What prefixes may take of each device, in bytes; vLLM's own memory profile does not know of it.
DEVICE_MEMORY, DEFAULT_DEVICE_MEMORY = "prefix_device_memory", 512 << 20
# The namespace of our cache salts; a client's own salt may not start with it.
SALT_PREFIX = "prefix-adapter:"
# Connectors that key what they store by vLLM's salted block hashes. Others key by token ids, where the placeholders of
# two adapters look alike, so that one adapter could be answered with the K/V of another.
COMPOSABLE = ("OffloadingConnector", "SimpleCPUOffloadConnector")


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixSpec:
    """What the engine knows of one prefix, tensors apart.

    Args:
        name: What requests call it.
        source: Folder or Hub repository, as the operator wrote it.
        path: The local folder it was read from.
        num_virtual_tokens: p.
        digest: SHA-256 of its weights and config, in hex.
        lora_path: The local folder of the LoRA that it was trained on, if any.
        lora_digest: SHA-256 of what that LoRA is, in hex.
    """

    name: str
    source: str
    path: str
    num_virtual_tokens: int
    digest: str
    lora_path: str | None = None
    lora_digest: str | None = None

    def salt(self, client_salt: str | None) -> str:
        """Returns the salt of the block hashes: other content, another name or another client salt shares no block."""
        return f"{SALT_PREFIX}{self.digest}:{len(self.name)}:{self.name}:{client_salt or ''}"


# Both ends do so for each request, and it is the same for all requests with one prefix.
@functools.lru_cache(maxsize=4096)
def pack(spec: PrefixSpec) -> bytes:
    """Returns what a request brings along to the engine: one string of bytes costs next to nothing to send and to read."""
    return msgspec.msgpack.encode(spec)


@functools.lru_cache(maxsize=4096)
def unpack(packed: bytes) -> PrefixSpec:
    """Returns the prefix that `pack` made this of."""
    return msgspec.msgpack.decode(packed, type=PrefixSpec)


def prefix_adapters(
    adapters: Mapping[str, str] | None = None,
    kv_transfer_config: Any = None,
    /,
    *,
    prefix_adapter_device_memory: float | None = None,
    **more: str,
) -> dict[str, Any]:
    """Returns the keyword arguments that make `LLM(...)` or `EngineArgs(...)` serve prefix adapters.

    Args:
        adapters: Folder or Hub repository of each adapter, by name, for names that are no Python identifiers.
        kv_transfer_config: A KV connector of your own to run beside the prefixes, if any.
        prefix_adapter_device_memory: What prefixes may take of each device's memory beside the KV cache, in GiB; 0.5 by
            default.
        more: Further adapters, by name.

    Raises:
        PrefixServeError: If there is no adapter, a name or the memory is not usable, or the connector cannot be combined.
    """
    from vllm_plugin import register

    register()
    sources = {**(adapters or {}), **more}
    if not sources:
        raise PrefixServeError("`prefix_adapters` needs at least one name=path.")
    for name in sources:
        check_name(name)
    options = [AdapterOption(name, str(source)) for name, source in sources.items()]
    memory: dict[str, int] = {}
    if prefix_adapter_device_memory is not None:
        try:
            memory[DEVICE_MEMORY] = parse_gib(str(prefix_adapter_device_memory))
        except ArgumentTypeError as error:
            raise PrefixServeError(f"`prefix_adapter_device_memory`: {error}.") from error
    return {"kv_transfer_config": merge(kv_transfer_config, settings(options, **memory))}


def settings(options: Iterable[AdapterOption], **more: Any) -> dict[str, Any]:
    """Returns the extra config of our connector before the engine's config is made."""
    return {ADAPTERS: [option._asdict() for option in options], **more}


def merge(theirs: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a `KVTransferConfig` with our connector, in front of the operator's own if there is one.

    Ours comes first since vLLM takes the first connector that has a hit, and no other can hold a prefix.

    Args:
        theirs: The operator's `KVTransferConfig`, its fields, or None.
        settings: The extra config of our connector.
    """
    from vllm.config import KVTransferConfig

    ours: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": dict(settings),
    }
    if isinstance(theirs, Mapping):
        theirs = KVTransferConfig(**theirs)
    if theirs is None or theirs.kv_connector is None:
        return KVTransferConfig(**ours)
    extra: dict[str, Any] = {}
    if theirs.kv_connector == "MultiConnector":
        extra = theirs.kv_connector_extra_config
        children = list(extra.get("connectors", []))
    else:
        fields = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
        children = [{name: value for name, value in fields.items() if name != "engine_id"}]
    for child in children:
        if child.get("kv_connector") not in COMPOSABLE or child.get("kv_connector_module_path"):
            raise PrefixServeError(
                f"Prefix adapters cannot run beside the KV connector {child.get('kv_connector')!r}: only connectors "
                f"that key by vLLM's block hashes can ({', '.join(COMPOSABLE)})."
            )
    return dataclasses.replace(
        theirs,
        kv_connector="MultiConnector",
        kv_connector_module_path=None,
        kv_role="kv_consumer" if theirs.kv_role == "kv_consumer" else "kv_both",
        kv_connector_extra_config={**extra, "connectors": [ours, *children]},
        # "recompute" would run the placeholders of a prefix as text.
        kv_load_failure_policy="fail",
    )


def settings_in(kv_transfer_config: Any) -> Mapping[str, Any] | None:
    """Returns the extra config of our connector in a `KVTransferConfig`; None if it is not there."""
    # Asked for each request.
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
    """Returns a copy of a `KVTransferConfig` of ours with another extra config of our connector."""
    if kv_transfer_config.kv_connector == CONNECTOR:
        return dataclasses.replace(kv_transfer_config, kv_connector_extra_config=dict(settings))
    children = [
        {**child, "kv_connector_extra_config": dict(settings)} if child.get("kv_connector") == CONNECTOR else child
        for child in kv_transfer_config.kv_connector_extra_config["connectors"]
    ]
    extra = {**kv_transfer_config.kv_connector_extra_config, "connectors": children}
    return dataclasses.replace(kv_transfer_config, kv_connector_extra_config=extra)
