"""KV events of requests with a prefix, as a router reads them that knows the client's tokens and the name in `model`.

vLLM publishes which blocks are in its KV cache. A router hashes the tokens of a prompt in blocks, under the adapter's name,
and looks for a replica that holds the first ones. Inside the engine p placeholders precede the prompt, so here

- a block that holds virtual tokens is not published: it stands for no token of a client;
- a block behind them is published with the tokens of the block of the prompt that it completes, under the adapter's name,
  and the first one has no parent.

If p is a multiple of the block size, both kinds of blocks are the same. If not, n blocks hold virtual tokens and, in the
last one, r tokens of the prompt. Block n + j of the cache ends r tokens behind block j of the prompt. It is published as
that one, and several blocks of the cache may be, which differ in the r tokens only. So block j has a hash of its own, which
depends on nothing behind it, and is removed with the last of them.

With `--prefix-match-unit` and recurrent layers, vLLM publishes the end of a prompt in units smaller than a block. The hashes
of our own go on in these units, so that the end follows the blocks before it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash, resolve_block_hashes

from vllm_plugin.adapters.spec import PrefixSpec, unpack
from vllm_plugin.kv_transfer_config import ADAPTERS

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

_EVENTS, _DIGESTS = "prefix_events", "prefix_event_digests"


def rewrite(pool: BlockPool, request: Request, event: BlockStored, start: int, stop: int, block_size: int) -> None:
    """Rewrites an event that vLLM made of a request, if the request has a prefix.

    Args:
        pool: Whose event it is.
        request: The request.
        event: The event; without block hashes if no block of it is to be published.
        start: The position of the first token of the event's blocks.
        stop: One past the position of the last.
        block_size: Tokens per block of the cache. The event may be of a part of one.
    """
    packed = (request.kv_transfer_params or {}).get(ADAPTERS)
    if packed is not None:
        blocks = _Blocks(pool, request, unpack(packed), event.block_size, block_size)
        _events(pool).add(event, blocks.publish(event, range(start // event.block_size, stop // event.block_size)))


def take(pool: BlockPool, events: list[KVCacheEvent]) -> list[KVCacheEvent]:
    """Returns the events to publish of those that vLLM takes out of a pool's queue."""
    ours = vars(_owner(pool)).get(_EVENTS)
    return events if ours is None else ours.take(events)


class PrefixEvents:
    """Which blocks of a pool are published under another hash than vLLM's, or not at all.

    It holds an entry per such block in the prefix cache. Blocks of different KV cache groups have the same hashes, so the
    group is part of a key.
    """

    def __init__(self) -> None:
        # Of each event in the queue, vLLM's hashes and the published ones, None for a block that is not published. Only
        # the order of the queue says which blocks are there. By the event's id, which is its own as long as it is kept.
        self._queued: dict[int, tuple[BlockStored, list[tuple[Any, Any]]]] = {}
        self._published: dict[Any, Any] = {}
        self._num_blocks: Counter[Any] = Counter()

    def __len__(self) -> int:
        return len(self._queued) + len(self._published) + len(self._num_blocks)

    def add(self, event: BlockStored, renamed: list[tuple[Any, Any]]) -> None:
        """Adds an event that goes into the queue, with vLLM's hash of each block that has another one, or None, outside."""
        self._queued[id(event)] = event, renamed

    def take(self, events: Iterable[KVCacheEvent]) -> list[KVCacheEvent]:
        """Returns the events of the queue that are to be published."""
        taken = []
        for event in events:
            if isinstance(event, BlockStored):
                _, renamed = self._queued.pop(id(event), (event, None))
                self._stored(renamed or (), event.group_idx)
                if renamed is not None and not event.block_hashes:
                    continue
            elif isinstance(event, BlockRemoved):
                event.block_hashes = list(self._removed(event.block_hashes, event.group_idx))
                if not event.block_hashes:
                    continue
            elif isinstance(event, AllBlocksCleared):
                self._published.clear()
                self._num_blocks.clear()
            taken.append(event)
        # What is left was in no queue.
        self._queued.clear()
        return taken

    def _stored(self, renamed: Iterable[tuple[Any, Any]], group: int | None) -> None:
        for block_hash, published in renamed:
            if (block_hash, group) not in self._published:
                self._published[block_hash, group] = published
                if published is not None:
                    self._num_blocks[published, group] += 1

    def _removed(self, block_hashes: Iterable[Any], group: int | None) -> Iterator[Any]:
        for block_hash in block_hashes:
            if (block_hash, group) not in self._published:
                yield block_hash
            elif (published := self._published.pop((block_hash, group))) is not None:
                self._num_blocks[published, group] -= 1
                if not self._num_blocks[published, group]:
                    del self._num_blocks[published, group]
                    yield published


class _Blocks:
    """The blocks of one request with a prefix, in the cache and in the prompt.

    Args:
        pool: The pool of the blocks.
        request: The request.
        spec: Its prefix.
        size: Tokens per block as published.
        block_size: Tokens per block of the cache, a multiple of it.
    """

    def __init__(self, pool: BlockPool, request: Request, spec: PrefixSpec, size: int, block_size: int) -> None:
        self._pool, self._request, self._spec, self._size = pool, request, spec, size
        p = spec.num_virtual_tokens
        # How many blocks hold virtual tokens (n), and how many tokens of the prompt the last of them holds (r).
        self._num_prefix_blocks = -(-p // size)
        self._shift = self._num_prefix_blocks * size - p
        self._has_own_hashes = p % block_size != 0
        # vLLM 0.33 may hash the tokens behind a block as well.
        self._lookahead = getattr(pool, "num_hash_lookahead_tokens", 0)

    def publish(self, event: BlockStored, indices: range) -> list[tuple[Any, Any]]:
        """Rewrites an event of the blocks `indices` of the cache.

        Returns:
            vLLM's hash of each block that is published under another one, and that one, or None if it is not published.
        """
        hashes = resolve_block_hashes(self._request.block_hashes, self._pool.hash_block_size, self._size)
        kept = list(indices)
        if len(event.block_hashes) < len(kept):
            # vLLM leaves out those that have left a sliding window.
            there = set(event.block_hashes)
            kept = [index for index in kept if maybe_convert_block_hash(hashes[index]) in there]
        group = event.group_idx
        assert group is not None
        first, stop = max(indices.start, self._num_prefix_blocks), indices.stop
        renamed: list[tuple[Any, Any]] = []
        published: list[Any] = []
        for index, engine_hash in zip(kept, event.block_hashes, strict=True):
            block_hash = self._published_hash(index, engine_hash)
            if block_hash is not None:
                published.append(block_hash)
            # What is not in the cache is never removed from it: vLLM reports hits in a sliding window from the first block.
            if block_hash != engine_hash and self._pool.get_cached_block(hashes[index], [group]):
                renamed.append((engine_hash, block_hash))
        kept = [index for index in kept if index >= first]
        event.block_hashes = published
        if first == self._num_prefix_blocks:
            event.parent_block_hash = None
        else:
            event.parent_block_hash = self._published_hash(first - 1, event.parent_block_hash)
        # Readers that know the number only must not take these blocks for those of the base model.
        event.lora_name, event.lora_id = self._spec.name, zlib.crc32(self._spec.name.encode()) or 1
        event.token_ids = self._request.all_token_ids[self._start(first) : self._start(stop)] if first < stop else []
        event.extra_keys = [self._extra_keys(*self._bounds(index)) or None for index in kept] or None
        if getattr(event, "lookahead_token_ids", None) is not None:
            # A field of vLLM 0.33.
            event.lookahead_token_ids = [  # type: ignore[attr-defined, unused-ignore]
                self._request.all_token_ids[self._start(index + 1) : self._start(index + 1) + self._lookahead]
                for index in kept
            ]
        return renamed

    def _start(self, index: int) -> int:
        """Returns where the block of the prompt starts that block `index` of the cache completes."""
        return index * self._size - self._shift

    def _bounds(self, index: int) -> tuple[int, int]:
        return self._start(index), self._start(index + 1)

    def _published_hash(self, index: int, engine_hash: Any) -> Any:
        """Returns the hash that block `index` of the cache is published under; None if it is not published."""
        if index < self._num_prefix_blocks:
            return None
        return self._own_hash(self._start(index + 1)) if self._has_own_hashes else engine_hash

    def _extra_keys(self, start: int, stop: int) -> tuple[Any, ...]:
        """Returns what tells a part of the prompt from others beside its tokens, in the form in which vLLM publishes it.

        The adapter's name is not among it: routers take a lone string for an image.
        """
        stop += self._lookahead
        media = (
            (feature.identifier, feature.mm_position.offset - start)
            for feature in self._request.mm_features
            if feature.mm_position.offset < stop and start < feature.mm_position.offset + feature.mm_position.length
        )
        client_salt = (self._request.cache_salt or "").removeprefix(self._spec.salt(None))
        return (*media, *([client_salt] if client_salt and start == self._spec.num_virtual_tokens else []))

    def _own_hash(self, stop: int) -> Any:
        """Returns a hash of the prompt up to a position, as vLLM publishes it: equal on all replicas for equal adapters."""
        request, unit, p = self._request, self._pool.hash_block_size, self._spec.num_virtual_tokens
        # Those of this request so far: of its adapter, and of the prompt up to the end of each unit.
        digests: list[bytes] = vars(request).setdefault(_DIGESTS, [])
        if not digests:
            lora = request.lora_request
            digests.append(_digest(request.cache_salt, unit, lora and (lora.lora_name, lora.lora_path)))
        for start in range(p + (len(digests) - 1) * unit, stop, unit):
            tokens = request.all_token_ids[start : start + unit + self._lookahead]
            digests.append(_digest(digests[-1], tokens, self._extra_keys(start, start + unit)))
        return maybe_convert_block_hash(BlockHash(digests[(stop - p) // unit]))


def _digest(*content: Any) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(content)).digest()


def _owner(pool: BlockPool) -> Any:
    """Returns the pool whose queue the events of a pool go into."""
    return getattr(pool, "_event_owner", pool)


def _events(pool: BlockPool) -> PrefixEvents:
    return vars(_owner(pool)).setdefault(_EVENTS, PrefixEvents())
