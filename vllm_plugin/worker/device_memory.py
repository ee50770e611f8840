"""The device's memory for prefixes: left free by the KV cache, and given back while the engine sleeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from vllm_plugin.kv_transfer_config import DEFAULT_DEVICE_MEMORY, DEVICE_MEMORY
from vllm_plugin.logger import logger


def without_prefixes(available: int, settings: Mapping[str, Any]) -> int:
    """Returns the bytes that are left for the KV cache.

    Args:
        available: The bytes that vLLM would give it.
        settings: The extra config of our connector.
    """
    reserved = settings.get(DEVICE_MEMORY, DEFAULT_DEVICE_MEMORY)
    logger.info(
        "%.2f GiB of the memory for the KV cache are kept for prefixes (--prefix-adapter-device-memory).",
        reserved / 2**30,
    )
    return int(available - reserved)


def release() -> None:
    """Drops the prefixes that this worker has on its device."""
    if not has_kv_transfer_group():
        return
    connector: Any = get_kv_transfer_group()
    # In vLLM's `MultiConnector`, ours is the first.
    ours = getattr(connector, "sub_connectors", [connector])[0]
    ours.release_device_memory()
