"""The worker's side of prefixes on caches that tests can read, without an engine."""

from __future__ import annotations

from typing import Any

import torch

from helpers.serving import support
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.cache_layers import CacheLayer, stacks_of
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.prefix_manager import PrefixManager

CONFIG = support.llama_config()
BLOCK_SIZE, NUM_BLOCKS = 4, 12
CPU = torch.device("cpu")
# Two layers, keys and values, two heads of 32 floats.
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4


class Cache:
    """An attention layer with a cache by slot, `[NUM_BLOCKS * BLOCK_SIZE, H, D]`, NaN where nothing was written."""

    def __init__(self, layer: CacheLayer) -> None:
        self.impl = self
        sizes = layer.key_size, layer.value_size
        self.kv_cache = [torch.full((NUM_BLOCKS * BLOCK_SIZE, 2, size), torch.nan) for size in sizes]
        self.num_writes = 0

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        self.num_writes += 1
        kv_cache[0][slots], kv_cache[1][slots] = key, value


def layer(index: int, group: int = 0, value_size: int = 32) -> CacheLayer:
    return CacheLayer(f"model.layers.{index}.self_attn.attn", index, group, BLOCK_SIZE, 2, 32, value_size)


class Worker:
    """A manager and a writer over two layers."""

    def __init__(
        self,
        device_memory: int,
        device: torch.device = CPU,
        groups: tuple[int, int] = (0, 0),
        value_sizes: tuple[int, int] = (32, 32),
    ) -> None:
        layers = [layer(index, groups[index], value_sizes[index]) for index in (0, 1)]
        self.caches = {each.name: Cache(each) for each in layers}
        stacks = stacks_of(layers)
        self.manager = PrefixManager(
            stacks, tp_rank=0, tp_size=1, dtype=torch.float32, device=device, device_memory=device_memory
        )
        self.writer = PrefixWriter(self.manager, self.caches)
        self.opened: list[str] = []
        original = self.manager.open
        self.manager.open = lambda spec: (self.opened.append(spec.name), original(spec))[1]

    def holds(self, prefix: support.Prefix, blocks: list[int], start: int, stop: int) -> bool:
        slots = [blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in range(start, stop)]
        return all(
            cache.kv_cache[kind][slots].equal(prefix[index][kind][:, start:stop].transpose(0, 1))
            for index, cache in enumerate(self.caches.values())
            for kind in (0, 1)
        )


def load(spec: PrefixSpec, *block_ids: list[int], start: int = 0) -> PrefixLoad:
    return PrefixLoad(spec, start, spec.num_virtual_tokens, block_ids)
