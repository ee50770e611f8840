"""What a load does on a GPU, without an engine: it is enqueued on the current stream, and waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.serving import support
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.loading import load as load_adapter
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.cache_layers import CacheLayer, stacks_of
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.prefix_manager import PrefixManager

pytestmark = pytest.mark.gpu

CONFIG = support.llama_config()
BLOCK_SIZE, NUM_BLOCKS, P = 16, 32, 40
# Some tenths of a second.
CYCLES = 1_000_000_000


class Layer:
    """An attention layer whose cache has a row for each slot, `[NUM_BLOCKS * BLOCK_SIZE, H, D]`."""

    def __init__(self) -> None:
        self.impl = self
        self.kv_cache = [torch.zeros(NUM_BLOCKS * BLOCK_SIZE, 2, 32, device="cuda") for _ in range(2)]

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        kv_cache[0][slots], kv_cache[1][slots] = key, value


def worker(device_memory: int) -> tuple[PrefixWriter, list[Layer]]:
    layers = [CacheLayer(f"layers.{index}.attn", index, 0, BLOCK_SIZE, 2, 32, 32) for index in (0, 1)]
    modules = {layer.name: Layer() for layer in layers}
    device = torch.device("cuda", torch.cuda.current_device())
    manager = PrefixManager(
        stacks_of(layers), tp_rank=0, tp_size=1, dtype=torch.float32, device=device, device_memory=device_memory
    )
    return PrefixWriter(manager, modules), list(modules.values())


@pytest.fixture
def prefix(tmp_path: Path) -> SimpleNamespace:
    kv = support.random_prefix(CONFIG, P)
    folder = str(support.write_adapter(tmp_path / "one", CONFIG, kv))
    return SimpleNamespace(kv=kv, spec=PrefixSpec("one", folder, folder, P, digest_of(load_adapter("one", folder))))


def holds(layers: list[Layer], kv: support.Prefix, blocks: list[int], start: int) -> bool:
    rows = [blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(start, P)]
    return all(
        layer.kv_cache[kind][rows].cpu().equal(kv[index][kind][:, start:].transpose(0, 1))
        for index, layer in enumerate(layers)
        for kind in (0, 1)
    )


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device_memory", [1 << 20, 1], ids=["on the device", "on the host"])
@pytest.mark.parametrize("start", [0, 32])
def test_a_load_is_enqueued_behind_what_the_stream_does(
    prefix: SimpleNamespace, device_memory: int, start: int
) -> None:
    writer, layers = worker(device_memory)
    load = PrefixLoad(prefix.spec, start, P, ([3, 1, 7],))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Opens the prefix, and allocates memory for the copies.
        writer.write([load])
        stream.synchronize()
        for layer in layers:
            for cache in layer.kv_cache:
                cache.zero_()
        torch.cuda._sleep(CYCLES)
        with no_synchronization():
            writer.write([load])
        assert not stream.query(), "the load has waited for the stream"
    stream.synchronize()
    assert writer.take_unwritten() == set()
    assert holds(layers, prefix.kv, [3, 1, 7], start)


def test_all_its_work_is_on_one_stream(prefix: SimpleNamespace) -> None:
    writer, _ = worker(1 << 20)
    load = PrefixLoad(prefix.spec, 0, P, ([3, 1, 7],))
    writer.write([load])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        writer.write([load])
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    assert on_device
    assert len({event.device_resource_id() for event in on_device}) == 1


def test_memory_of_an_evicted_prefix_is_not_reused_too_early(tmp_path: Path) -> None:
    """Each prefix evicts the other while the copies of both are still enqueued."""
    kvs = [support.random_prefix(CONFIG, P, seed=seed) for seed in (1, 2)]
    specs = []
    for name, kv in zip("ab", kvs, strict=True):
        folder = str(support.write_adapter(tmp_path / name, CONFIG, kv))
        specs.append(PrefixSpec(name, folder, folder, P, digest_of(load_adapter(name, folder))))
    size = 2 * 2 * 2 * 32 * 4 * P
    writer, layers = worker(size)
    blocks = [[3, 1, 7], [4, 2, 8]]
    torch.cuda._sleep(CYCLES)
    for _ in range(3):
        for spec, ids in zip(specs, blocks, strict=True):
            writer.write([PrefixLoad(spec, 0, P, (ids,))])
    torch.cuda.synchronize()
    for kv, ids in zip(kvs, blocks, strict=True):
        assert holds(layers, kv, ids, 0)
