"""Which prefixes of an engine are pinned now: by name, so that a new version takes the place of the one before.

The scheduler learns of a pinned prefix from its requests, and tells the workers. A prefix that was unloaded, or replaced by
one that is not pinned, has no requests any more: the names of the server's pinned adapters say so (`pinned_names.py`). An
engine on another machine than the server does not see them, and forgets a prefix without requests after a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_plugin.adapters.pinned_names import PinnedNames
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.kv_transfer_config import REGISTRY
from vllm_plugin.scheduler.pinned_blocks import PinnedBlocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# How often the names are looked at.
_LOOK_SECONDS = 1.0
# How often the blocks are looked for again, if something has used them that does not tell of it.
_REFRESH_SECONDS = 30.0
# After this time without a request a prefix is forgotten where unloading cannot be seen.
_UNUSED_SECONDS = 24 * 3600.0


class PinnedPrefixes:
    """The pinned prefixes of one engine, and their blocks.

    Args:
        names: The names of the server's pinned adapters.
        blocks: The blocks of the pinned prefixes.
        blocks_of: Returns the blocks of a request by its id.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        names: PinnedNames,
        blocks: PinnedBlocks,
        blocks_of: Callable[[str], KVCacheBlocks],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = blocks
        self._names, self._blocks_of, self._clock = names, blocks_of, clock
        self._specs: dict[str, PrefixSpec] = {}
        self._used: dict[str, float] = {}
        self._changed = False
        self._next_look = self._next_refresh = -float("inf")

    @classmethod
    def of_engine(
        cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_cache_manager: KVCacheManager
    ) -> PinnedPrefixes:
        """Returns those of an engine whose cache manager was just made."""
        assert vllm_config.kv_transfer_config is not None
        limits = vllm_config.scheduler_config
        blocks = PinnedBlocks(
            kv_cache_manager.block_pool,
            [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups],
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
        )
        folder = vllm_config.kv_transfer_config.get_from_extra_config(REGISTRY, "")
        return cls(PinnedNames(folder), blocks, kv_cache_manager.get_blocks)

    def __bool__(self) -> bool:
        return bool(self._specs)

    def used(self, spec: PrefixSpec, request: Request) -> None:
        """Records a request with a prefix, pinned or not, when it was given blocks."""
        name = spec.name
        if not spec.pinned:
            self._forget(name)
            return
        if self._specs.get(name) != spec:
            self._specs[name], self._changed = spec, True
        self._used[name] = self._clock()
        self.blocks.add(spec, request.cache_salt or "", self._blocks_of(request.request_id).blocks)

    def next_step(self) -> None:
        """Keeps the blocks from being the next to be evicted. Call it once per step, when requests have ended."""
        if self._specs:
            if (now := self._clock()) >= self._next_look:
                self._next_look = now + _LOOK_SECONDS
                self._forget_unloaded(now)
            if now >= self._next_refresh:
                self._next_refresh = now + _REFRESH_SECONDS
                self.blocks.refresh()
            self.blocks.next_step()

    def take_digests(self) -> frozenset[str] | None:
        """Returns the digests of the pinned prefixes, and of those of the draft model, if they have changed since."""
        if not self._changed:
            return None
        self._changed = False
        specs = self._specs.values()
        return frozenset([*(spec.digest for spec in specs), *(spec.draft.digest for spec in specs if spec.draft)])

    def _forget_unloaded(self, now: float) -> None:
        names = self._names.current()
        if names is not None:
            gone = self._specs.keys() - names
        else:
            gone = {name for name, used in self._used.items() if used < now - _UNUSED_SECONDS}
        for name in gone:
            self._forget(name)

    def _forget(self, name: str) -> None:
        if self._specs.pop(name, None) is not None:
            self._changed = True
            self._used.pop(name)
            self.blocks.remove(name)
