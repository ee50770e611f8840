"""Which requests fail with a failed load, and which of their blocks must leave the prefix cache.

Blocks that were computed after a missing prefix are wrong, and later requests would find them in the prefix cache. vLLM
does not report all of them. It misses the blocks of requests that share the block which was not loaded. With async
scheduling it also misses those of a request that has ended, or whose first blocks have left a sliding window, before
the outcome of the load is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_plugin.logger import logger
from vllm_plugin.scheduler.other_connectors import keeps_blocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

# More steps than vLLM schedules before it knows the outcome of one: the number of pipeline stages, or two.
STEPS_IN_FLIGHT = 32
BlockIds = tuple[list[int], ...]
_BLOCK_IDS = "prefix_block_ids"


class RecentBlocks:
    """The blocks that requests with a prefix had in the last steps."""

    def __init__(self) -> None:
        self._steps: deque[list[BlockIds]] = deque([[]])

    def __len__(self) -> int:
        return sum(map(len, self._steps))

    def add(self, request: Request, block_ids: BlockIds) -> None:
        """Records the blocks that a request was scheduled with, or that it had when it ended."""
        step = self._steps[-1]
        step.append(block_ids)
        setattr(request, _BLOCK_IDS, (step, block_ids))

    def next_step(self) -> None:
        """Starts a new step, and forgets the oldest one, whose loads can no longer fail."""
        if len(self._steps) == STEPS_IN_FLIGHT:
            self._steps.popleft().clear()
        self._steps.append([])

    def expand_to_requests(self, block_ids: set[int]) -> set[int]:
        """Returns these blocks and all blocks of the requests that had one of them."""
        had = (_flat(blocks) for step in self._steps for blocks in step)
        return block_ids.union(*(blocks for blocks in had if not blocks.isdisjoint(block_ids)))


def recent_blocks_of(request: Request) -> BlockIds:
    """Returns the blocks that were last recorded for a request, or none if that was too long ago."""
    step, block_ids = getattr(request, _BLOCK_IDS, (None, ()))
    return block_ids if step else ()


def fail_requests(
    scheduler: Any, invalid_block_ids: set[int], handle_invalid_blocks: Callable[[], set[str]]
) -> set[str]:
    """Evicts the blocks of the requests that a failed load affects.

    Args:
        scheduler: vLLM's `Scheduler`.
        invalid_block_ids: The blocks that were not loaded.
        handle_invalid_blocks: vLLM's own method, which supports only one KV cache group.

    Returns:
        The ids of these requests, which vLLM then fails.
    """
    # In vLLM's `MultiConnector`, ours is the first.
    ours, *others = getattr(scheduler.connector, "sub_connectors", [scheduler.connector])
    ours.scheduler.other_connectors.load_failed([other for other in others if keeps_blocks(other)])
    manager = scheduler.kv_cache_manager
    # A request whose text comes from another server may share the prefix of one that failed.
    waiting = [each for each in scheduler.requests.values() if each.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
    blocks = {
        request.request_id: _flat((*manager.get_block_ids(request.request_id), *recent_blocks_of(request)))
        for request in (*scheduler.running, *waiting)
    }
    # The KV cache groups share one pool, so an id names one block.
    failed = {request_id for request_id, ids in blocks.items() if not ids.isdisjoint(invalid_block_ids)}
    if len(scheduler.kv_cache_config.kv_cache_groups) == 1:
        # It also knows the loads of other connectors.
        failed |= handle_invalid_blocks()
    elif failed:
        logger.error("Failing %d requests whose prefix was not loaded: %s.", len(failed), ", ".join(sorted(failed)))
    manager.evict_blocks(set().union(*(blocks.get(request_id, ()) for request_id in failed)))
    return failed


def _flat(block_ids: BlockIds) -> set[int]:
    return set().union(*block_ids)
