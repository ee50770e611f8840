"""Patches of vLLM's GPU worker: the device's memory for prefixes, beside that of the KV cache.

vLLM asks a worker how much memory the KV cache may take before it creates the connector, so these are attached as soon as
a worker imports its class. The class of CPU workers overrides both methods, since there the device is the host.
"""

from __future__ import annotations

from typing import Any

from vllm_plugin.kv_transfer_config import settings_in
from vllm_plugin.patches.patch import MethodPatch


def _determine_available_memory(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> int:
    """Leaves room for prefixes, which vLLM's profile cannot see: they come with the first requests."""
    by_hand = instance.cache_config.kv_cache_memory_bytes is not None
    available: int = wrapped(*args, **kwargs)
    ours = settings_in(instance.vllm_config.kv_transfer_config)
    if ours is None or by_hand:
        return available
    from vllm_plugin.worker.device_memory import without_prefixes

    return without_prefixes(available, ours)


def _sleep(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Frees the prefixes on the device. vLLM frees what its own allocator gave out, and then empties torch's cache."""
    if settings_in(instance.vllm_config.kv_transfer_config) is not None:
        from vllm_plugin.worker.device_memory import release

        release()
    wrapped(*args, **kwargs)


_WORKER = "vllm.v1.worker.gpu_worker"
WORKER_PATCHES = (
    MethodPatch(_WORKER, "Worker.determine_available_memory", (), _determine_available_memory, in_workers=True),
    MethodPatch(_WORKER, "Worker.sleep", ("level",), _sleep, in_workers=True),
)
