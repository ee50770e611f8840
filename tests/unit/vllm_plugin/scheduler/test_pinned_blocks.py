"""The blocks of pinned prefixes in vLLM's own pool: which are evicted last, and how often they are moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler.pinned_blocks import MAX_SALTS, PinnedBlocks

BLOCK_SIZE = 4
ONE = PrefixSpec("one", "", "/one", 2 * BLOCK_SIZE, "1" * 64, pinned=True)
TWO = dataclasses.replace(ONE, name="two", digest="2" * 64)
NEVER_SAFE = 1000


class CountingPool(BlockPool):
    """A pool of ten blocks, which counts how often blocks are touched."""

    def __init__(self) -> None:
        super().__init__(num_gpu_blocks=11, enable_caching=True, hash_block_size=BLOCK_SIZE)
        self.num_touched = 0

    def touch(self, blocks: Any) -> None:
        self.num_touched += len(blocks)
        super().touch(blocks)

    def fill(self, number: int, text: str, behind: int = 0) -> list[Any]:
        """Takes blocks as a request does whose tokens fill them, behind those that it has already."""
        blocks = self.get_new_blocks(number)
        for index, block in enumerate(blocks):
            key = make_block_hash_with_group_id(f"{text} {index}".encode(), 0)  # type: ignore[arg-type]
            self._insert_block_hash(key, block, num_tokens=(behind + index + 1) * BLOCK_SIZE)
        return blocks

    def release(self, blocks: list[Any]) -> None:
        """Frees blocks as a request does that ends."""
        self.free_blocks(reversed(blocks))


@pytest.fixture
def pool() -> CountingPool:
    return CountingPool()


def ask(pool: CountingPool, pinned: PinnedBlocks, spec: PrefixSpec = ONE, salt: str = "") -> list[Any]:
    """Runs a request with a prefix of two blocks and a block of text; returns the blocks of the prefix."""
    blocks = pool.fill(3, spec.digest + salt)
    pinned.add(spec, salt, (blocks,))
    pool.release(blocks)
    return blocks[:2]


def again(pool: CountingPool, pinned: PinnedBlocks, blocks: list[Any], spec: PrefixSpec = ONE) -> None:
    """Runs a request that finds the blocks of its prefix, and needs no other."""
    pool.touch(blocks)
    pinned.add(spec, "", (blocks,))
    pool.release(blocks)


def cached(blocks: list[Any]) -> list[bool]:
    return [block.block_hash is not None for block in blocks]


@pytest.mark.parametrize("protected", [True, False])
def test_they_are_evicted_after_all_others(pool: CountingPool, protected: bool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    prefix = ask(pool, pinned)
    other = pool.fill(4, "other")
    pool.release(other)
    if protected:
        pinned.next_step()
    pool.get_new_blocks(6)
    assert cached(prefix) == [protected, protected]
    if protected:
        assert cached(other) == [True, True, False, False]
        pool.get_new_blocks(2)
        # Soft: a block of a prefix is taken rather than a request refused. The first one stays longest.
        pool.get_new_blocks(1)
        assert cached(prefix) == [True, False]
        pool.get_new_blocks(1)
        assert cached(prefix) == [False, False]


def test_text_behind_a_prefix_and_what_is_not_cached_is_left_alone(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    ask(pool, pinned)
    pinned.next_step()
    assert pool.num_touched == 2
    blocks = pool.get_new_blocks(2)
    pinned.add(TWO, "", ([pool.null_block, blocks[0]], [blocks[1]]))
    pool.release(blocks)
    pinned.next_step()
    assert pool.num_touched == 2
    assert list(pinned._adapters) == ["one"]


def test_nothing_is_moved_while_nothing_was_freed(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    assert not pinned
    pinned.next_step()
    ask(pool, pinned)
    for _ in range(5):
        pinned.next_step()
        pinned.protect()
    assert pool.num_touched == 2
    pool.release(pool.fill(1, "other"))
    pinned.next_step()
    assert pool.num_touched == 4


def test_nothing_is_moved_while_no_step_can_reach_them(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, 1)
    prefix = ask(pool, pinned)
    pinned.next_step()
    # Eight blocks lie before them.
    for step in range(7):
        assert pool.num_touched == 2, step
        pool.release(pool.fill(1, f"other {step}"))
        pinned.next_step()
    assert pool.num_touched == 4
    assert cached(prefix) == [True, True]


def test_blocks_in_use_stay_where_they_are(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    blocks = pool.fill(2, "prefix")
    pinned.add(ONE, "", (blocks,))
    pinned.next_step()
    assert pool.num_touched == 0
    assert [block.ref_cnt for block in blocks] == [1, 1]
    assert pool.get_num_free_blocks() == 8


def test_those_used_least_recently_go_first(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    one, two = ask(pool, pinned), ask(pool, pinned, TWO)
    again(pool, pinned, one)
    pinned.next_step()
    pool.get_new_blocks(8)
    assert cached(one) == [True, True]
    assert cached(two) == [False, False]


def test_use_of_one_does_not_expose_another(pool: CountingPool) -> None:
    """Its blocks are the last of the queue before and after a request, which frees text before them."""
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    one, two = ask(pool, pinned), ask(pool, pinned, TWO)
    for step in range(5):
        pinned.next_step()
        pool.touch(two)
        text = pool.fill(3, f"text {step}", behind=2)
        pinned.add(TWO, "", ([*two, *text],))
        pool.release([*two, *text])
    pinned.next_step()
    assert cached([*one, *two]) == [True] * 4


def test_a_new_version_releases_the_one_before(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    before = ask(pool, pinned)
    after = ask(pool, pinned, dataclasses.replace(ONE, digest="f" * 64))
    pinned.next_step()
    pool.get_new_blocks(8)
    assert cached(before) == [False, False]
    assert cached(after) == [True, True]
    pinned.remove("one")
    assert not pinned


def test_clients_cannot_pin_with_many_salts() -> None:
    pool = CountingPool()
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    for number in range(MAX_SALTS + 3):
        block = pool.fill(1, f"{number}")
        pinned.add(ONE, f"{number}", (block,))
        pool.release(block)
    pinned.next_step()
    assert pool.num_touched == MAX_SALTS


def test_the_cache_can_be_reset(pool: CountingPool) -> None:
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    prefix = ask(pool, pinned)
    pinned.next_step()
    assert pool.reset_prefix_cache()
    pool.release(pool.fill(1, "other"))
    pinned.next_step()
    assert not pinned
    assert cached(prefix) == [False, False]
    assert pool.get_num_free_blocks() == 10


def test_without_prefix_caching_there_is_nothing_to_keep() -> None:
    pool = BlockPool(num_gpu_blocks=11, enable_caching=False, hash_block_size=BLOCK_SIZE)
    pinned = PinnedBlocks(pool, NEVER_SAFE)
    blocks = pool.get_new_blocks(2)
    pinned.add(ONE, "", (blocks,))
    pool.free_blocks(blocks)
    pinned.next_step()
    assert not pinned
