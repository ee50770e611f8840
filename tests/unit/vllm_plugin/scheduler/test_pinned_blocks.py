"""The blocks of pinned prefixes in vLLM's own pool: which are evicted last, and how often they are moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from helpers.serving.pinned import BLOCK_SIZE, ONE, TWO, CountingPool, pinned_blocks
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler.pinned_blocks import MAX_SALTS, PinnedBlocks


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
    pinned = pinned_blocks(pool)
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
    pinned = pinned_blocks(pool)
    ask(pool, pinned)
    pinned.next_step()
    assert pool.num_moved == 2
    blocks = pool.get_new_blocks(2)
    pinned.add(TWO, "", ([pool.null_block, *blocks],))
    pool.release(blocks)
    pinned.next_step()
    assert pool.num_moved == 2
    assert list(pinned._adapters) == ["one"]


def test_nothing_is_moved_while_nothing_was_freed(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool)
    assert not pinned
    pinned.next_step()
    ask(pool, pinned)
    for _ in range(5):
        pinned.next_step()
        pinned.before_request(BLOCK_SIZE)
    assert pool.num_moved == 2
    pool.release(pool.fill(1, "other"))
    pinned.next_step()
    assert pool.num_moved == 3


def test_nothing_is_moved_while_no_step_can_reach_them(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool, 1)
    prefix = ask(pool, pinned)
    pinned.next_step()
    # Eight blocks lie before them. Moving both is less work than moving the others.
    for step in range(8):
        assert pool.num_moved == 2, step
        pool.release(pool.fill(1, f"other {step}"))
        pinned.next_step()
    assert pool.num_moved == 4
    assert cached(prefix) == [True, True]


def test_nothing_is_moved_unless_blocks_may_be_loaded_for_a_request(pool: CountingPool) -> None:
    """Blocks that another connector fills are not among those that a step computes."""
    pinned = pinned_blocks(pool, 1)
    prefix = ask(pool, pinned)
    pinned.next_step()
    for step in range(3):
        pool.release(pool.fill(2, f"other {step}"))
    pinned.before_request(BLOCK_SIZE)
    assert pool.num_moved == 2
    pinned.before_request(8 * BLOCK_SIZE)
    assert pool.num_moved == 4
    pool.get_new_blocks(8)
    assert cached(prefix) == [True, True]


@pytest.mark.parametrize("num_pinned", [2, 40])
def test_a_step_costs_what_it_has_freed(num_pinned: int) -> None:
    pool = CountingPool(100)
    pinned = pinned_blocks(pool)
    spec = dataclasses.replace(ONE, num_virtual_tokens=num_pinned * BLOCK_SIZE)
    prefix = pool.fill(num_pinned, "prefix")
    pinned.add(spec, "", (prefix,))
    pool.release(prefix)
    pinned.next_step()
    for step in range(50):
        pool.num_moved = 0
        pool.release(pool.fill(3, f"{step}"))
        pinned.next_step()
        assert pool.num_moved == min(3, num_pinned)
    assert all(cached(prefix))


def test_others_keep_their_order() -> None:
    pool = CountingPool(11)
    pinned = pinned_blocks(pool)
    prefix = pool.fill(4, "prefix")
    pinned.add(dataclasses.replace(ONE, num_virtual_tokens=4 * BLOCK_SIZE), "", (prefix,))
    pool.release(prefix)
    pinned.next_step()
    first, then = pool.fill(3, "first"), pool.fill(3, "then")
    for blocks in (first, then):
        pool.release(blocks)
        pinned.next_step()
    # One that was never used lies before them.
    pool.get_new_blocks(3)
    assert cached(first + then) == [True, False, False] + [True] * 3


def test_blocks_in_use_stay_where_they_are(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool)
    blocks = pool.fill(2, "prefix")
    pinned.add(ONE, "", (blocks,))
    pinned.next_step()
    assert pool.num_moved == 0
    assert [block.ref_cnt for block in blocks] == [1, 1]
    assert pool.get_num_free_blocks() == 8


def test_those_used_least_recently_go_first(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool)
    one, two = ask(pool, pinned), ask(pool, pinned, TWO)
    again(pool, pinned, one)
    pinned.next_step()
    pool.get_new_blocks(8)
    assert cached(one) == [True, True]
    assert cached(two) == [False, False]


def test_use_of_one_does_not_expose_another(pool: CountingPool) -> None:
    """Its blocks are the last of the queue before and after a request, which frees text before them."""
    pinned = pinned_blocks(pool)
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
    pinned = pinned_blocks(pool)
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
    pinned = pinned_blocks(pool)
    for number in range(MAX_SALTS + 3):
        block = pool.fill(1, f"{number}")
        pinned.add(ONE, f"{number}", (block,))
        pool.release(block)
    pinned.next_step()
    assert pool.num_moved == MAX_SALTS


def test_layers_with_a_window_keep_what_a_longer_prompt_does_not_need() -> None:
    """A request that finds more than the prefix has no blocks of it there."""
    pool = CountingPool(20)
    pinned = pinned_blocks(pool, num_groups=2)
    full, window = pool.fill(2, "prefix"), pool.fill(2, "prefix", group=1)
    pinned.add(ONE, "", (full, [pool.null_block, window[1]]))
    pool.release(full + window)
    pinned.next_step()
    pool.touch(full)
    pinned.add(ONE, "", (full, [pool.null_block, pool.null_block]))
    pool.release(pool.fill(4, "other"))
    pinned.next_step()
    pool.release(full)
    pinned.refresh()
    pool.release(pool.fill(4, "more"))
    pinned.next_step()
    pool.get_new_blocks(17)
    assert cached(full + window) == [True, True, False, True]


def test_blocks_that_slide_out_of_a_window_are_kept_while_their_request_runs() -> None:
    pool = CountingPool(20)
    pinned = pinned_blocks(pool, num_groups=2)
    full, window = pool.fill(2, "prefix"), pool.fill(2, "prefix", group=1)
    pinned.add(ONE, "", (full, window))
    for block in window:
        pool.release([block])
        pool.release(pool.fill(4, "other"))
        pinned.next_step()
    pool.get_new_blocks(16)
    assert cached(full + window) == [True] * 4
    # In all groups, the first block stays longest.
    pool.release(full)
    pinned.next_step()
    pool.get_new_blocks(2)
    assert cached(full + window) == [True, True, False, False]


def test_blocks_that_are_cached_later_are_learned_from_the_next_request(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool)
    ask(pool, pinned)
    pool.free_blocks(pool.get_new_blocks(10))
    prefix = pool.get_new_blocks(2)
    pinned.add(ONE, "", (prefix,))
    for index, block in enumerate(prefix):
        key = make_block_hash_with_group_id(f"{index}".encode(), 0)  # type: ignore[arg-type]
        pool._insert_block_hash(key, block, num_tokens=(index + 1) * BLOCK_SIZE)
    pool.release(prefix)
    again(pool, pinned, prefix)
    pool.release(pool.fill(4, "other"))
    pinned.next_step()
    pool.get_new_blocks(8)
    assert cached(prefix) == [True, True]


def test_what_a_connector_has_used_is_found_again(pool: CountingPool) -> None:
    """One that stores blocks touches and frees them, and nothing tells of it."""
    pinned = pinned_blocks(pool)
    prefix = ask(pool, pinned)
    pinned.next_step()
    # Of the two, this is the last one of the queue.
    pool.touch(prefix[:1])
    pool.release(pool.fill(3, "other"))
    pool.release(prefix[:1])
    pinned.refresh()
    pinned.next_step()
    pool.get_new_blocks(8)
    assert cached(prefix) == [True, True]


def test_the_cache_can_be_reset(pool: CountingPool) -> None:
    pinned = pinned_blocks(pool)
    prefix = ask(pool, pinned)
    pinned.next_step()
    assert pool.reset_prefix_cache()
    pool.release(pool.fill(1, "other"))
    pinned.next_step()
    pinned.refresh()
    assert not pinned
    assert cached(prefix) == [False, False]
    assert pool.get_num_free_blocks() == 10


def test_without_prefix_caching_there_is_nothing_to_keep() -> None:
    pool = BlockPool(num_gpu_blocks=11, enable_caching=False, hash_block_size=BLOCK_SIZE)
    pinned = pinned_blocks(pool)
    blocks = pool.get_new_blocks(2)
    pinned.add(ONE, "", (blocks,))
    pool.free_blocks(blocks)
    pinned.next_step()
    assert not pinned
    assert pool.get_num_free_blocks() == 10
