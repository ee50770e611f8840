"""The blocks of pinned prefixes, which are evicted when no other block is free.

Nothing is reserved: a block that no request uses is free, and resetting the cache forgets it. They are looked at when the
next step could reach them; with many free blocks, that is once in many steps.

Requests are given blocks while a step is scheduled, and blocks are freed when it ends. Blocks of requests that are aborted
between two steps are behind those of prefixes for one step, unless a request is admitted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler.evicted_last import EvictedLast, Hashed

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

# A prefix has other blocks for each salt that a client chooses, and clients may choose any number of them.
MAX_SALTS = 8


class _Salted:
    """The blocks of one prefix and one salt, per KV cache group by the tokens up to their end."""

    def __init__(self, num_groups: int) -> None:
        self.groups: list[dict[int, Hashed]] = [{} for _ in range(num_groups)]
        # What the request that used them last has at these positions, if nothing has changed since.
        self.given: list[list[KVCacheBlock]] | None = None

    def __iter__(self) -> Iterator[Hashed]:
        for group in self.groups:
            yield from group.values()

    def drop_evicted(self) -> None:
        self.given = None
        self.groups = [
            {end: (block, hash_) for end, (block, hash_) in group.items() if block.block_hash == hash_}
            for group in self.groups
        ]


class _Adapter:
    """The blocks of one version of an adapter, by salt; those used last are at the end."""

    def __init__(self, spec: PrefixSpec) -> None:
        self.spec = spec
        self.salts: OrderedDict[str, _Salted] = OrderedDict()


class PinnedBlocks:
    """The full blocks of the pinned prefixes of one engine.

    Args:
        pool: vLLM's pool of blocks.
        block_sizes: Tokens per block of each KV cache group.
        max_num_tokens: How many tokens a step computes at most.
        max_num_requests: Of how many requests.
    """

    def __init__(self, pool: BlockPool, block_sizes: Sequence[int], max_num_tokens: int, max_num_requests: int) -> None:
        self._pool, self._block_sizes = pool, block_sizes
        # Blocks that a step takes at most: those of new tokens, and two that each request begins.
        self._blocks_per_step = sum(max_num_tokens // size + 2 * max_num_requests for size in block_sizes)
        # By name; those used last are at the end.
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()
        # The free ones of their blocks.
        self._last = EvictedLast(pool)
        # The others, by name and salt: per KV cache group that has some, with the first block of the prefix at the end.
        self._in_use: dict[tuple[str, str], list[list[Hashed]]] = {}
        # At least so many other free blocks are evicted before them.
        self._num_before = 0

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def add(self, spec: PrefixSpec, salt: str, blocks: Sequence[Sequence[KVCacheBlock]]) -> None:
        """Remembers the blocks of a prefix in a request that was given blocks. Those of another version are forgotten.

        Args:
            spec: The prefix.
            salt: The salt of the request's block hashes.
            blocks: The request's blocks per KV cache group, from position 0.
        """
        p = spec.num_virtual_tokens
        given = [list(group[: p // size]) for group, size in zip(blocks, self._block_sizes, strict=True)]
        adapter = self._adapters.get(spec.name)
        if adapter is None or adapter.spec != spec:
            self.remove(spec.name)
            adapter = self._adapters[spec.name] = _Adapter(spec)
        self._adapters.move_to_end(spec.name)
        salted = adapter.salts.get(salt)
        if salted is None:
            salted = adapter.salts[salt] = _Salted(len(given))
        adapter.salts.move_to_end(salt)
        if salted.given == given:
            # Another request uses the same blocks, none of which has been moved since.
            self._in_use[spec.name, salt] = self._in_use.pop((spec.name, salt))
            return
        learned = False
        for known, group in zip(salted.groups, given, strict=True):
            self._last.taken(group)
            for block in group:
                # Layers of a sliding window have no block, or one without a hash, for what is not kept. The blocks that
                # other requests have there stay known: whoever has a longer prompt in common needs none of them.
                end, hash_ = block.block_hash_num_tokens, block.block_hash
                if end is None or end > p or (block.pool is not None and block.pool is not self._pool):
                    continue
                learned = True
                before = known.get(end)
                if before is not None and before[0] is not block:
                    # A copy, of which one is enough.
                    self._last.release([before])
                known[end] = block, hash_
        if not any(salted.groups):
            self._remove_salt(adapter, salt)
            return
        # Blocks that another connector loads are cached later, and learned from the next request.
        salted.given = given if learned else None
        self._watch(spec.name, salt, salted)
        if len(adapter.salts) > MAX_SALTS:
            self._remove_salt(adapter, next(iter(adapter.salts)))

    def remove(self, name: str) -> None:
        """Forgets the blocks of an adapter. They are evicted like others from then on."""
        adapter = self._adapters.get(name)
        if adapter is not None:
            for salt in list(adapter.salts):
                self._remove_salt(adapter, salt)

    def next_step(self) -> None:
        """Makes sure that the next step reaches none of the blocks before all others. Call it once per step."""
        self._protect(self._blocks_per_step)

    def before_request(self, num_tokens: int) -> None:
        """Makes sure of the same before a request is given blocks of which others may load so many tokens."""
        self._protect(sum(num_tokens // size + 1 for size in self._block_sizes))

    def refresh(self) -> None:
        """Forgets blocks that were evicted, and looks for the others again. Call it now and then.

        It takes a millisecond for some thousand blocks. A connector that stores blocks may use and free them, and nothing
        tells of it.
        """
        self._last.clear()
        self._num_before = 0
        for name, adapter in list(self._adapters.items()):
            for salt, salted in list(adapter.salts.items()):
                salted.drop_evicted()
                if any(salted.groups):
                    self._watch(name, salt, salted)
                else:
                    self._remove_salt(adapter, salt)

    def _protect(self, num_blocks: int) -> None:
        self._num_before -= num_blocks
        if self._num_before < self._blocks_per_step and self._adapters:
            self._last.restore(self._freed())
            self._num_before = self._pool.get_num_free_blocks() - len(self._last)

    def _freed(self) -> list[Hashed]:
        """Returns the blocks that no request uses any more, in the order in which they are evicted."""
        all_freed: list[Hashed] = []
        # Requests give up the first blocks first, as a window slides, or all of them at once.
        changed = [key for key, groups in self._in_use.items() for group in groups if group[-1][0].ref_cnt == 0]
        for key in dict.fromkeys(changed):
            groups, freed = self._in_use.pop(key), []
            for group in groups:
                while group and group[-1][0].ref_cnt == 0:
                    block, hash_ = group.pop()
                    if block.block_hash == hash_:
                        freed.append((block, hash_))
            if still_used := [group for group in groups if group]:
                self._in_use[key] = still_used
            name, salt = key
            self._adapters[name].salts[salt].given = None
            # The first blocks of a prefix are worth most: without them, vLLM does not find the others.
            freed.sort(key=_end_of, reverse=True)
            all_freed += freed
        return all_freed

    def _watch(self, name: str, salt: str, salted: _Salted) -> None:
        """Waits for the blocks of a salt that are not in the row to become free."""
        free = self._last.block_ids
        groups = (
            [hashed for _, hashed in sorted(group.items(), reverse=True) if hashed[0].block_id not in free]
            for group in salted.groups
        )
        # Those used last are freed last.
        self._in_use.pop((name, salt), None)
        self._in_use[name, salt] = [group for group in groups if group]

    def _remove_salt(self, adapter: _Adapter, salt: str) -> None:
        name, salted = adapter.spec.name, adapter.salts.pop(salt)
        self._in_use.pop((name, salt), None)
        self._last.release(salted)
        if not adapter.salts:
            del self._adapters[name]


def _end_of(hashed: Hashed) -> int:
    end = hashed[0].block_hash_num_tokens
    assert end is not None
    return end
