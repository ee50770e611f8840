"""Patches of vLLM's KV events, which it makes only with `--kv-events-config`."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_events import BlockStored

from vllm_plugin.patches.arguments import argument
from vllm_plugin.patches.patch import MethodPatch
from vllm_plugin.scheduler import kv_events


def _build_block_stored_event(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> BlockStored:
    event: BlockStored = wrapped(*args, **kwargs)
    request, start, stop = (
        argument(wrapped, args, kwargs, name) for name in ("request", "start_token_idx", "end_token_idx")
    )
    kv_events.rewrite(instance, request, event, start, stop, event.block_size)
    return event


def _cache_partial_block(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Rewrites the event of a hit that may end within a block (`--prefix-match-unit`); vLLM makes it in place."""
    num_events = len(instance.kv_event_queue)
    key = wrapped(*args, **kwargs)
    for event in instance.kv_event_queue[num_events:]:
        if isinstance(event, BlockStored):
            request, stop, block_size = (
                argument(wrapped, args, kwargs, name) for name in ("request", "num_tokens", "block_size")
            )
            kv_events.rewrite(instance, request, event, stop - event.block_size, stop, block_size)
    return key


def _take_events(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    events = wrapped(*args, **kwargs)
    return kv_events.take(instance, events) if events else events


_POOL = "vllm.v1.core.block_pool"
KV_EVENT_PATCHES = (
    MethodPatch(
        _POOL,
        "BlockPool._build_block_stored_event",
        ("request", "start_token_idx", "end_token_idx"),
        _build_block_stored_event,
    ),
    MethodPatch(_POOL, "BlockPool.cache_partial_block", ("request", "num_tokens", "block_size"), _cache_partial_block),
    MethodPatch(_POOL, "BlockPool.take_events", (), _take_events),
)
