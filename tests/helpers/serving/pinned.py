"""A pool of blocks of vLLM that counts moves, and the pinned blocks in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler.pinned_blocks import PinnedBlocks

BLOCK_SIZE = 4
ONE = PrefixSpec("one", "", "/one", 2 * BLOCK_SIZE, "1" * 64, pinned=True)
TWO = dataclasses.replace(ONE, name="two", digest="2" * 64)


class CountingPool(BlockPool):
    """A pool of ten blocks, which counts how often blocks are moved within the queue of free blocks."""

    def __init__(self, num_blocks: int = 10) -> None:
        super().__init__(num_gpu_blocks=num_blocks + 1, enable_caching=True, hash_block_size=BLOCK_SIZE)
        self.num_moved = 0
        remove = self.free_block_queue.remove

        def counting(block: Any) -> None:
            self.num_moved += 1
            remove(block)

        self.free_block_queue.remove = counting  # type: ignore[method-assign]

    def touch(self, blocks: Any) -> None:
        moved = self.num_moved
        super().touch(blocks)
        self.num_moved = moved

    def fill(self, number: int, text: str, behind: int = 0, group: int = 0) -> list[Any]:
        """Takes blocks as a request does whose tokens fill them, behind those that it has already."""
        blocks = self.get_new_blocks(number)
        for index, block in enumerate(blocks):
            key = make_block_hash_with_group_id(f"{text} {index}".encode(), group)  # type: ignore[arg-type]
            self._insert_block_hash(key, block, num_tokens=(behind + index + 1) * BLOCK_SIZE)
        return blocks

    def release(self, blocks: list[Any]) -> None:
        """Frees blocks as a request does that ends."""
        self.free_blocks(reversed(blocks))


def pinned_blocks(pool: BlockPool, blocks_per_step: int = 1000, num_groups: int = 1) -> PinnedBlocks:
    """Returns the pinned blocks of a pool of which a step takes so many; by default, no block is ever safe."""
    return PinnedBlocks(pool, [BLOCK_SIZE] * num_groups, blocks_per_step * BLOCK_SIZE, 0)
