"""Which requests a load that failed takes with it, and what they may not leave behind in the prefix cache.

Blocks computed behind a prefix that was not there are wrong, and would be found again once it is. Some of them vLLM does
not name: those of a request that shares the block which was not loaded; and, where steps are scheduled before the outcome
of an earlier one is known, of a request that is gone by then, or whose first blocks have left a sliding window.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters.spec import settings_in

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.prefix_adapters")

# More steps than are scheduled before the outcome of one is known: as many as pipeline stages, or two.
STEPS_IN_FLIGHT = 32
BlockIds = tuple[list[int], ...]
_GIVEN = "prefix_block_ids"


class RecentBlocks:
    """The blocks that requests with a prefix had in the last steps."""

    def __init__(self) -> None:
        self._steps: deque[list[BlockIds]] = deque([[]])

    def __len__(self) -> int:
        return sum(map(len, self._steps))

    def add(self, request: Request, block_ids: BlockIds) -> None:
        """Notes what a request was scheduled with, or what it had when it ended."""
        step = self._steps[-1]
        step.append(block_ids)
        setattr(request, _GIVEN, (step, block_ids))

    def next_step(self) -> None:
        """Forgets what can no longer turn out not to be loaded."""
        if len(self._steps) == STEPS_IN_FLIGHT:
            self._steps.popleft().clear()
        self._steps.append([])

    def expand_to_requests(self, block_ids: set[int]) -> set[int]:
        """Returns these blocks and all that a request had together with one of them."""
        had = (_flat(blocks) for step in self._steps for blocks in step)
        return block_ids.union(*(blocks for blocks in had if not blocks.isdisjoint(block_ids)))


def recent_blocks_of(request: Request) -> BlockIds:
    """Returns the blocks that a request was last noted with, as long as that is not forgotten."""
    step, block_ids = getattr(request, _GIVEN, (None, ()))
    return block_ids if step else ()


def handle_invalid_blocks(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wraps vLLM's own, which also ends the engine where the layers of a model form several KV cache groups."""
    if settings_in(instance.vllm_config.kv_transfer_config) is None:
        return wrapped(*args, **kwargs)
    invalid = kwargs["invalid_block_ids"] if "invalid_block_ids" in kwargs else args[0]
    # Under vLLM's `MultiConnector` ours is the first.
    ours, *other_connectors = getattr(instance.connector, "sub_connectors", [instance.connector])
    ours.scheduler.other_connectors.load_failed(other_connectors)
    manager = instance.kv_cache_manager
    blocks = {
        request.request_id: _flat((*manager.get_block_ids(request.request_id), *recent_blocks_of(request)))
        for request in instance.running
    }
    # Whatever the group: all of them take their blocks from one pool, so an id names one block.
    failed = {request_id for request_id, ids in blocks.items() if not ids.isdisjoint(invalid)}
    if len(instance.kv_cache_config.kv_cache_groups) == 1:
        # It knows what another connector loads, too.
        failed |= wrapped(*args, **kwargs)
    elif failed:
        logger.error("Failing %d requests whose prefix was not loaded: %s.", len(failed), ", ".join(sorted(failed)))
    manager.evict_blocks(set().union(*(blocks.get(request_id, ()) for request_id in failed)))
    return failed


def _flat(block_ids: BlockIds) -> set[int]:
    return set().union(*block_ids)
