"""Which prefixes an engine takes for pinned, and when it forgets one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request

from vllm_plugin.adapters.pinned_names import PinnedNames
from vllm_plugin.adapters.registry import Adapter, Registry
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler.pinned_blocks import PinnedBlocks
from vllm_plugin.scheduler.pinned_prefixes import _REFRESH_SECONDS, PinnedPrefixes

ONE = PrefixSpec("one", "", "/one", 8, "1" * 64, pinned=True)
TWO = dataclasses.replace(ONE, name="two", digest="2" * 64, draft=PrefixSpec("two", "", "/draft", 8, "3" * 64))
NEWER = dataclasses.replace(ONE, digest="f" * 64)


class Engine:
    """An engine's pinned prefixes, the registry of its server, and a clock that tests turn."""

    def __init__(self, registry: Path, names: Path) -> None:
        self.registry, self.now = Registry(registry), 0.0
        self.registry.add([Adapter(spec, None, ()) for spec in (ONE, TWO)])
        self.pool = pool = BlockPool(num_gpu_blocks=11, enable_caching=True, hash_block_size=4)
        self.block = block = pool.get_new_blocks(1)[0]
        block.set_block_hash(make_block_hash_with_group_id(b"block", 0), num_tokens=4)  # type: ignore[arg-type]
        self.pinned = PinnedPrefixes(
            PinnedNames(str(names)),
            PinnedBlocks(pool, [4], 4, 0),
            lambda _: KVCacheBlocks(([block],)),
            lambda: self.now,
        )
        for spec in (ONE, TWO):
            self.use(spec)

    def use(self, spec: PrefixSpec) -> None:
        params = SamplingParams(max_tokens=1)
        self.pinned.used(spec, Request("request", [3], params, None, cache_salt=spec.salt(None)))

    def later(self, seconds: float) -> frozenset[str] | None:
        self.now += seconds
        self.pinned.next_step()
        return self.pinned.take_digests()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path, tmp_path)


ALL = {ONE.digest, TWO.digest, "3" * 64}


def test_workers_are_told_of_changes(engine: Engine) -> None:
    assert engine.pinned.take_digests() == ALL
    engine.use(ONE)
    assert engine.pinned.take_digests() is None
    engine.use(NEWER)
    assert engine.pinned.take_digests() == {*ALL, NEWER.digest} - {ONE.digest}
    # Another adapter is none of our business.
    engine.use(PrefixSpec("three", "", "/three", 8, "4" * 64))
    assert engine.pinned.take_digests() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda registry: registry.remove("one"),
        lambda registry: registry.exchange(Adapter(ONE, None, ()), None),
        lambda registry: registry.add([Adapter(dataclasses.replace(NEWER, pinned=False), None, ())], replace=True),
    ],
    ids=["unloaded", "gone", "replaced"],
)
def test_a_prefix_without_an_adapter_is_forgotten(engine: Engine, change: Callable[[Registry], None]) -> None:
    assert engine.later(1.1) == ALL
    assert engine.later(1.1) is None
    change(engine.registry)
    assert engine.later(0.5) is None
    assert engine.later(0.6) == ALL - {ONE.digest}
    assert list(engine.pinned.blocks._adapters) == ["two"]
    # A request that was on its way.
    engine.use(ONE)
    assert engine.later(1.1) == ALL - {ONE.digest}
    engine.registry.remove("two")
    assert engine.later(1.1) == frozenset()
    assert not engine.pinned


def test_a_version_that_is_not_pinned_ends_it_at_once(engine: Engine) -> None:
    engine.use(dataclasses.replace(NEWER, pinned=False))
    assert engine.pinned.take_digests() == ALL - {ONE.digest}


def test_where_unloading_cannot_be_seen_unused_prefixes_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    engine = Engine(tmp_path / "server", tmp_path / "nowhere")
    assert engine.later(23 * 3600) == ALL
    engine.use(TWO)
    assert engine.later(2 * 3600) == ALL - {ONE.digest}
    assert engine.later(23 * 3600) == frozenset()


def test_blocks_that_were_evicted_are_forgotten(engine: Engine) -> None:
    engine.later(1)
    engine.pool.free_blocks([engine.block])
    assert engine.pool.reset_prefix_cache()
    engine.later(_REFRESH_SECONDS - 1)
    assert engine.pinned.blocks
    engine.later(1)
    assert not engine.pinned.blocks
    assert engine.pinned
