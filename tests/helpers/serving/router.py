"""A router that finds prompts in a replica's KV cache by its events, as the indexers of llm-d and Dynamo do.

It hashes the tokens of a prompt in blocks, chained, under the name of the adapter, and knows nothing of prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent


class Router:
    """What it knows of one replica.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # The router's own key of each block, by the engine's hash.
        self._keys: dict[Any, int] = {}
        # The KV cache group of the layers that see the whole context. Routers follow these.
        self._group: int | None = None
        self.num_orphans = self.num_unknown = 0

    def receive(self, events: Iterable[KVCacheEvent]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                if event.kv_cache_spec_kind in (None, "full_attention"):
                    self._group = event.group_idx
                    self._store(event)
            elif isinstance(event, BlockRemoved):
                if event.group_idx == self._group:
                    for block_hash in event.block_hashes:
                        self.num_unknown += self._keys.pop(block_hash, None) is None
            else:
                self._keys.clear()

    def match(self, name: str | None, tokens: Sequence[int], extra_keys: Sequence[Any] = ()) -> int:
        """Returns how many blocks of a prompt the replica has under a name, None for the base model."""
        held = set(self._keys.values())
        keys = self._chain(hash(name), tokens, extra_keys)
        return next((index for index, key in enumerate(keys) if key not in held), len(keys))

    def _store(self, event: BlockStored) -> None:
        assert len(event.token_ids) == len(event.block_hashes) * self._block_size
        assert len(set(event.block_hashes)) == len(event.block_hashes)
        if event.parent_block_hash is None:
            parent = hash(event.lora_name)
        elif event.parent_block_hash in self._keys:
            parent = self._keys[event.parent_block_hash]
        else:
            self.num_orphans += 1
            return
        keys = self._chain(parent, event.token_ids, event.extra_keys or ())
        self._keys.update(zip(event.block_hashes, keys, strict=True))

    def _chain(self, parent: int, tokens: Sequence[int], extra_keys: Sequence[Any]) -> list[int]:
        keys = []
        for index in range(len(tokens) // self._block_size):
            block = tokens[index * self._block_size : (index + 1) * self._block_size]
            extra = extra_keys[index] if index < len(extra_keys) else None
            parent = hash((parent, tuple(block), repr(extra)))
            keys.append(parent)
        return keys
