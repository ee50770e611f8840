"""The blocks of pinned prefixes, kept at the end of vLLM's queue of free blocks, which are evicted from its front.

Nothing holds on to a block: it stays free, is evicted when no other block is left, and resetting the cache forgets it. A
step takes a bounded number of blocks from the queue. So with many free blocks, ours are safe for many steps once they
are at the end, and nothing is looked at meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters.spec import PrefixSpec

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig

# A prefix has other blocks for each salt that a client chooses, and clients may choose any number of them.
MAX_SALTS = 8
# Blocks with the hashes that they had. A block with another hash was evicted.
_Hashed = list[tuple["KVCacheBlock", Any]]


class _Adapter:
    """The blocks of one version of an adapter, by salt; those used last are at the end."""

    def __init__(self, spec: PrefixSpec) -> None:
        self.spec = spec
        self.salts: OrderedDict[str, _Hashed] = OrderedDict()


class PinnedBlocks:
    """The full blocks of the pinned prefixes of one engine.

    Args:
        pool: vLLM's pool of blocks.
        blocks_per_step: More blocks than a step usually takes from the pool; see `blocks_per_step`.
    """

    def __init__(self, pool: BlockPool, blocks_per_step: int) -> None:
        self._pool, self._blocks_per_step = pool, blocks_per_step
        # By name; those used last are at the end.
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()
        self._safe_steps = 0
        # The one of ours that was moved to the very end. As long as it is there, no other block is behind ours.
        self._end: KVCacheBlock | None = None

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def add(self, spec: PrefixSpec, salt: str, blocks: Iterable[Sequence[KVCacheBlock]]) -> None:
        """Remembers the blocks of a prefix in a request that was given blocks. Those of another version are forgotten.

        Args:
            spec: The prefix.
            salt: The salt of the request's block hashes.
            blocks: The request's blocks per KV cache group, from position 0.
        """
        hashed = [(block, block.block_hash) for group in blocks for block in self._full(group, spec.num_virtual_tokens)]
        adapter = self._adapters.get(spec.name)
        if adapter is None or adapter.spec != spec:
            self.remove(spec.name)
            if not hashed:
                return
            adapter = self._adapters[spec.name] = _Adapter(spec)
        self._adapters.move_to_end(spec.name)
        # It may be one of these: then it returns to the end, with others between it and ours.
        self._end = None
        adapter.salts[salt] = hashed
        adapter.salts.move_to_end(salt)
        if len(adapter.salts) > MAX_SALTS:
            adapter.salts.popitem(last=False)

    def remove(self, name: str) -> None:
        """Forgets the blocks of an adapter. They are evicted like others from then on."""
        self._adapters.pop(name, None)

    def next_step(self) -> None:
        """Moves the blocks to the end of the queue if the next step could reach them. Call it once per step."""
        self._safe_steps -= 1
        self.protect()

    def protect(self) -> None:
        """Moves the blocks to the end of the queue if that is due."""
        if self._safe_steps > 0 or not self._adapters:
            return
        pool, queue = self._pool, self._pool.free_block_queue
        if self._end is None or queue.fake_free_list_tail.prev_free_block is not self._end:
            free = list(self._free())
            pool.touch(free)
            pool.free_blocks(free)
            self._end = free[-1] if free else None
            self._safe_steps = (pool.get_num_free_blocks() - len(free)) // self._blocks_per_step - 1

    def _full(self, group: Sequence[KVCacheBlock], num_tokens: int) -> Iterator[KVCacheBlock]:
        """Yields the cached blocks among the first ones of a KV cache group that hold nothing but virtual tokens."""
        for block in islice(group, num_tokens):
            # Layers of a sliding window have no block, or one without a hash, for what is not kept.
            if block.is_null or block.block_hash_num_tokens is None:
                continue
            if block.block_hash_num_tokens > num_tokens:
                return
            if block.pool is None or block.pool is self._pool:
                yield block

    def _free(self) -> Iterator[KVCacheBlock]:
        """Yields the blocks that no request uses, in the order in which they may be evicted, and forgets evicted ones."""
        for name, adapter in list(self._adapters.items()):
            for salt, blocks in list(adapter.salts.items()):
                cached = [(block, hash_) for block, hash_ in blocks if block.block_hash == hash_]
                adapter.salts[salt] = cached
                if not cached:
                    del adapter.salts[salt]
                # The first blocks of a prefix are worth most: without them, vLLM does not find the others.
                yield from (block for block, _ in reversed(cached) if block.ref_cnt == 0)
            if not adapter.salts:
                del self._adapters[name]


def blocks_per_step(limits: SchedulerConfig, kv_cache_config: KVCacheConfig) -> int:
    """Returns how many blocks the requests of one step can need: those of new tokens, and two that each of them begins."""
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return sum(limits.max_num_batched_tokens // size + 2 * limits.max_num_seqs for size in sizes)
