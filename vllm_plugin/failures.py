"""Which requests a load that failed takes with it, where vLLM cannot say."""

from __future__ import annotations

import logging
from typing import Any

from vllm_plugin.config import settings_in

logger = logging.getLogger("vllm.prefix_adapters")


def handle_invalid_blocks(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wraps vLLM's own, which raises, and so ends the engine, where the layers of a model form several KV cache groups."""
    is_ours = settings_in(instance.vllm_config.kv_transfer_config) is not None
    if not is_ours or len(instance.kv_cache_config.kv_cache_groups) == 1:
        return wrapped(*args, **kwargs)
    return fail_requests_with(kwargs["invalid_block_ids"] if "invalid_block_ids" in kwargs else args[0], instance)


def fail_requests_with(block_ids: set[int], scheduler: Any) -> set[str]:
    """Returns the running requests that hold one of these blocks, and takes all of their blocks out of the prefix cache.

    Args:
        block_ids: Blocks of any KV cache group: all groups take theirs from one pool, so an id names one block.
        scheduler: vLLM's `Scheduler`.
    """
    manager = scheduler.kv_cache_manager
    held = {
        request.request_id: set().union(*manager.get_block_ids(request.request_id)) for request in scheduler.running
    }
    failed = {request_id for request_id, ids in held.items() if not ids.isdisjoint(block_ids)}
    if failed:
        logger.error(
            "Failing %d requests whose prefix could not be loaded: %s.", len(failed), ", ".join(sorted(failed))
        )
        manager.evict_blocks(set().union(*(held[request_id] for request_id in failed)))
    return failed
