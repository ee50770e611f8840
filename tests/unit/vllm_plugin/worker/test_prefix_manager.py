"""The prefixes that a worker keeps, and what it writes to which slots of a cache that tests can read."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.serving import support
from helpers.serving.worker import BLOCK_SIZE, BYTES_PER_TOKEN, CONFIG, CPU, NUM_BLOCKS, Cache, Worker, layer, load
from vllm_plugin.adapters.cache_layout import CacheLayout, halves_to_pairs
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.loading import load as load_adapter
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.connector import PrefixConnector
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.metadata import PrefixMetadata
from vllm_plugin.metrics import RESIDENCY, RESIDENT
from vllm_plugin.worker.cache_layers import CacheLayer, stacks_of
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.prefix_manager import HOST_FACTOR, PrefixManager


def test_all_loads_of_a_step_are_one_write_per_layer(adapters: Any) -> None:
    (one, one_kv), (two, two_kv) = adapters("one"), adapters("two", 9)
    worker = Worker(1 << 20)
    worker.writer.write([load(one, [3, 1]), load(two, [2, 4, 5]), load(one, [3, 6], start=4)])
    assert worker.holds(one_kv, [3, 1], 0, 6)
    assert worker.holds(one_kv, [3, 6], 4, 6)
    assert worker.holds(two_kv, [2, 4, 5], 0, 9)
    cache = worker.caches[layer(0).name]
    assert int(cache.kv_cache[0].isnan().all(dim=(1, 2)).logical_not().sum()) == 6 + 9 + 2
    assert [cache.num_writes for cache in worker.caches.values()] == [1, 1]
    assert worker.opened == ["one", "two"]
    assert worker.writer.take_unwritten() == set()


@pytest.mark.parametrize("value_sizes", [(16, 16), (32, 16)])
def test_values_may_be_narrower_than_keys(tmp_path: Path, value_sizes: tuple[int, int]) -> None:
    prefix = [
        (key, value[..., :size].contiguous())
        for (key, value), size in zip(support.random_prefix(CONFIG, 6), value_sizes, strict=True)
    ]
    folder = support.write_adapter(tmp_path / "one", CONFIG, prefix)
    spec = PrefixSpec("one", str(folder), str(folder), 6, digest_of(load_adapter("one", str(folder))))
    worker = Worker(1 << 20, value_sizes=value_sizes)
    worker.writer.write([load(spec, [3, 1]), load(spec, [3, 6], start=4)])
    assert worker.holds(prefix, [3, 1], 0, 6)
    assert worker.holds(prefix, [3, 6], 4, 6)
    assert worker.manager._on_device.used == 6 * 4 * 2 * (2 * 32 + sum(value_sizes))


class LatentCache:
    """A latent layer with a cache by slot, `[NUM_BLOCKS * BLOCK_SIZE, D]`, written as `MLAAttention` writes it."""

    kv_cache_dtype, _k_scale = "fp8", torch.tensor(0.5)

    def __init__(self) -> None:
        self.impl = self
        self.kv_cache = torch.full((NUM_BLOCKS * BLOCK_SIZE, 32 + 8), torch.nan)
        self.written_with: list[tuple[str, torch.Tensor]] = []

    def do_kv_cache_update(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: Any,
        dtype: str,
        scale: torch.Tensor,
    ) -> None:
        assert kv_c.shape[1:] == (32,)
        assert k_pe.shape[1:] == (1, 8)
        self.written_with.append((dtype, scale))
        kv_cache[slots] = torch.cat([kv_c, k_pe[:, 0]], dim=-1)


def test_a_latent_is_written_with_the_dtype_and_the_scale_of_its_cache(tmp_path: Path) -> None:
    latents = [(torch.randn(1, 6, 32), torch.randn(1, 6, 8)) for _ in range(2)]
    folder = support.write_adapter(tmp_path / "one", CONFIG, latents)
    spec = PrefixSpec("one", str(folder), str(folder), 6, digest_of(load_adapter("one", str(folder))))
    layout = CacheLayout(32, reorder_value=halves_to_pairs)
    layers = [CacheLayer(str(index), index, 0, BLOCK_SIZE, 1, 32, 8, layout) for index in (0, 1)]
    caches = {layer.name: LatentCache() for layer in layers}
    manager = PrefixManager(
        stacks_of(layers), tp_rank=1, tp_size=2, dtype=torch.float32, device=CPU, device_memory=1 << 20
    )
    PrefixWriter(manager, caches).write([load(spec, [3, 1]), load(spec, [3, 6], start=4)])
    for (kv_c, k_pe), cache in zip(latents, caches.values(), strict=True):
        rows = torch.cat([kv_c, k_pe[..., [0, 4, 1, 5, 2, 6, 3, 7]]], dim=-1)[0]
        assert cache.kv_cache[[12, 13, 14, 15, 4, 5]].equal(rows)
        assert cache.kv_cache[[24, 25]].equal(rows[4:])
        assert cache.written_with == [("fp8", LatentCache._k_scale)]


def test_layers_of_a_sliding_window_skip_what_has_left_it(adapters: Any) -> None:
    spec, kv = adapters("one", 10)
    worker = Worker(1 << 20, groups=(0, 1))
    worker.writer.write([load(spec, [1, 2, 3], [0, 0, 4])])
    full, sliding = (worker.caches[layer(index).name].kv_cache[0] for index in (0, 1))
    assert full[4:14].equal(kv[0][0].transpose(0, 1))
    assert sliding[16:18].equal(kv[1][0][:, 8:].transpose(0, 1))
    assert sliding[:16].isnan().all()
    # The whole prefix has left the window.
    worker.writer.write([load(spec, [1, 2, 3], [0, 0, 0])])
    assert sliding[:16].isnan().all()


def test_the_least_recently_used_makes_room(adapters: Any) -> None:
    specs = {name: adapters(name)[0] for name in "abc"}
    worker = Worker(2 * 6 * BYTES_PER_TOKEN)
    for name in "abacab":
        worker.writer.write([load(specs[name], [1, 2])])
    assert worker.opened == ["a", "b", "c", "b"]
    assert worker.manager.num_resident == 2
    assert worker.manager._on_device.used == 2 * 6 * BYTES_PER_TOKEN


def test_prefixes_that_do_not_fit_are_still_written(adapters: Any) -> None:
    specs = {name: adapters(name, p) for name, p in (("a", 6), ("b", 6), ("large", 13))}
    worker = Worker(12 * BYTES_PER_TOKEN)
    blocks = {"a": [1, 2], "b": [3, 4], "large": [5, 6, 7, 8]}
    for _ in range(2):
        worker.writer.write([load(specs[name][0], blocks[name]) for name in specs])
        for name, (spec, kv) in specs.items():
            assert worker.holds(kv, blocks[name], 0, spec.num_virtual_tokens)
    # Prefixes that fit stay. One that does not fit, or several that do not fit in one step, evict none.
    assert worker.opened == ["a", "b", "large", "large"]


def test_without_device_memory_prefixes_stay_on_the_host(adapters: Any) -> None:
    spec, kv = adapters("one")
    # Not a CPU to the manager, which then has a pool on the host as well.
    worker = Worker(6 * BYTES_PER_TOKEN, torch.device("meta"))
    worker.manager._on_device.capacity, worker.writer._device = 0, CPU
    for _ in range(2):
        worker.writer.write([load(spec, [1, 2])])
        assert worker.holds(kv, [1, 2], 0, 6)
    assert worker.opened == ["one"]
    assert worker.manager.num_resident == 0
    assert worker.manager._on_host.capacity == HOST_FACTOR * 6 * BYTES_PER_TOKEN


def test_out_of_device_memory_keeps_the_prefix_on_the_host(
    adapters: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError

    spec, kv = adapters("one")
    worker = Worker(1 << 20)
    monkeypatch.setattr("vllm_plugin.worker.prefix_manager.PrefixKV.to", refuse)
    with caplog.at_level(logging.WARNING, "vllm.prefix_adapters"):
        worker.writer.write([load(spec, [1, 2])])
    assert worker.holds(kv, [1, 2], 0, 6)
    assert "lower --prefix-adapter-device-memory" in caplog.text
    assert worker.manager._on_device.capacity == 0


def test_out_of_memory_while_writing_fails_all_loads_of_the_step(
    adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError

    worker = Worker(1 << 20)
    monkeypatch.setattr(Cache, "do_kv_cache_update", refuse)
    worker.writer.write([load(adapters("a")[0], [1, 2, 3]), load(adapters("b")[0], [4, 5], start=4)])
    assert worker.writer.take_unwritten() == {1, 2, 3, 5}


def test_the_same_content_is_there_once(adapters: Any, tmp_path: Path) -> None:
    spec, _ = adapters("one")
    shutil.copytree(spec.path, tmp_path / "copy")
    copy = PrefixSpec("copy", "", str(tmp_path / "copy"), 6, spec.digest)
    worker = Worker(1 << 20)
    worker.writer.write([load(spec, [1, 2]), load(copy, [3, 4])])
    assert worker.manager._on_device.used == 6 * BYTES_PER_TOKEN


def test_what_is_resident_is_reported_when_it_changes(adapters: Any) -> None:
    one, two = adapters("one")[0], adapters("two")[0]
    worker = Worker(1 << 20)
    told = []
    for spec in (one, one, two):
        worker.writer.write([load(spec, [1, 2])])
        told.append(worker.writer.stats.take())
    assert [stats and stats.data for stats in told] == [
        {RESIDENT: 1, RESIDENCY: {"device": {"one": 1}}},
        None,
        {RESIDENT: 2, RESIDENCY: {"device": {"two": 1}}},
    ]


def test_a_replaced_prefix_is_counted_until_it_goes(adapters: Any) -> None:
    """The name stays where it is, so that nothing is told of it."""
    one, newer = adapters("one")[0], dataclasses.replace(adapters("two")[0], name="one")
    worker = Worker(1 << 20)
    worker.writer.write([load(one, [1, 2])])
    worker.writer.stats.take()
    worker.writer.write([load(newer, [1, 2])])
    assert worker.writer.stats.take().data == {RESIDENT: 2}


def test_the_tiers_of_prefixes_are_reported(adapters: Any) -> None:
    """Room for one on the device; the host, where there is one, has room for all."""
    one, two = adapters("one")[0], adapters("two")[0]
    worker = Worker(6 * BYTES_PER_TOKEN, torch.device("meta"))
    told = []
    for spec in (one, two):
        worker.manager.gather([spec])
        told.append(worker.manager.take_residency())
    worker.manager.release_device_memory()
    told.append(worker.manager.take_residency())
    assert told == [
        {"device": {"one": 1}, "host": {"one": 1}},
        {"device": {"one": 0, "two": 1}, "host": {"two": 1}},
        {"device": {"two": 0}},
    ]


def test_prefixes_of_the_draft_model_are_not_counted(adapters: Any) -> None:
    """Nobody would take what a writer of drafts has to report, and adapters come and go for ever."""
    connector = PrefixConnector.__new__(PrefixConnector)
    connector.scheduler = None
    connector.writer, connector.draft_writer = Worker(1 << 20).writer, Worker(1 << 20).writer
    spec, draft = adapters("one")[0], adapters("draft")[0]
    connector.bind_connector_metadata(PrefixMetadata([load(dataclasses.replace(spec, draft=draft), [1, 2])]))
    connector.start_load_kv(None)
    assert connector.draft_writer._manager.num_resident == 1
    assert connector.draft_writer.stats.is_empty()
    assert connector.get_kv_connector_stats().data == {RESIDENT: 1, RESIDENCY: {"device": {"one": 1}}}


def test_a_prefix_that_cannot_be_read_is_nowhere(adapters: Any) -> None:
    spec = adapters("one")[0]
    shutil.rmtree(spec.path)
    worker = Worker(1 << 20)
    worker.writer.write([load(spec, [1, 2])])
    assert worker.manager.take_residency() == {}
    assert RESIDENCY not in worker.writer.stats.data
    assert len(worker.manager._residency) == 0


def test_a_cache_that_cannot_be_written_is_refused() -> None:
    modules = {name: SimpleNamespace(impl=object()) for name in Worker(0).caches}
    with pytest.raises(PrefixServeError, match="cannot be written from outside"):
        PrefixWriter(Worker(0).manager, modules)
