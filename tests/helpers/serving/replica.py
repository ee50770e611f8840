"""A replica of vLLM's scheduler that publishes KV events, without a model."""

from __future__ import annotations

import itertools
from typing import Any

from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from helpers.serving.router import Router
from vllm_plugin.adapters.spec import PrefixSpec, pack
from vllm_plugin.patches.install import require
from vllm_plugin.scheduler.scheduler import PrefixScheduler

BLOCK_SIZE, UNIT = 32, 8
SPECS = {p: PrefixSpec(f"p{p}", "", f"/p{p}", p, f"{p:064}") for p in (1, 31, 32, 70, 96)}
PICTURES = [
    MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=20))
    for name, offset in (("a", 5), ("b", 40), ("c", 90))
]


class Replica:
    """A KV cache whose requests are stored whole, and a router that listens to it."""

    def __init__(self, unit: int = BLOCK_SIZE, num_blocks: int = 100) -> None:
        require(server=False, kv_events=True)
        kv_cache_utils.init_none_hash(sha256)
        self.pool = BlockPool(num_blocks, True, unit, enable_kv_cache_events=True)
        self.router = Router(BLOCK_SIZE)
        self._scheduler = PrefixScheduler(BLOCK_SIZE)
        self._hasher = kv_cache_utils.get_request_block_hasher(unit, sha256)
        self._stored: dict[Any, Any] = {}

    def request(self, prompt: list[int], p: int | None = None, **fields: Any) -> Request:
        transfer = None if p is None else {"kv_transfer_params": {"prefix_adapters": pack(SPECS[p])}}
        params = SamplingParams(max_tokens=5, extra_args=transfer)
        request = Request(
            f"request-{id(prompt)}", list(prompt), params, None, **{"block_hasher": self._hasher, **fields}
        )
        self._scheduler.add_placeholders(request)
        return request

    def store(self, request: Request, steps: int = 1, group: int = 0) -> list[Any]:
        """Stores the full blocks of a request, in several steps; blocks that it shares with others are there already."""
        hashes = kv_cache_utils.resolve_block_hashes(request.block_hashes, self.pool.hash_block_size, BLOCK_SIZE)
        hashes = [hashes[index] for index in range(request.num_tokens // BLOCK_SIZE)]
        cached = next((i for i, each in enumerate(hashes) if (each, group) not in self._stored), len(hashes))
        blocks = [self._stored[each, group] for each in hashes[:cached]]
        blocks += self.pool.get_new_blocks(len(hashes) - cached)
        bounds = [cached + (len(hashes) - cached) * step // steps for step in range(steps + 1)]
        for start, stop in itertools.pairwise(bounds):
            self.pool.cache_full_blocks(request, blocks, start, stop, BLOCK_SIZE, group)
        self._stored.update(zip([(each, group) for each in hashes], blocks, strict=True))
        return blocks

    def publish(self) -> list[Any]:
        events = self.pool.take_events()
        self.router.receive(events)
        return events

    def remove(self, blocks: list[Any]) -> None:
        by_id = {block.block_id: block for block in blocks}
        self._stored = {key: block for key, block in self._stored.items() if block.block_id not in by_id}
        self.pool.evict_blocks(set(by_id))
        self.pool.free_blocks(by_id.values())

    def clear(self) -> None:
        self.pool.free_blocks(self._stored.values())
        self._stored.clear()
        assert self.pool.reset_prefix_cache()

    @property
    def blocks(self) -> list[Any]:
        return list(self._stored.values())
