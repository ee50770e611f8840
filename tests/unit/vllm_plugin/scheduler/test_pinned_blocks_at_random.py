"""The blocks of pinned prefixes in vLLM's own pool, under random events."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from helpers.serving.pinned import BLOCK_SIZE, ONE, CountingPool, pinned_blocks


class Random:
    """Random events of an engine with three adapters, and what the queue has to look like after each step."""

    SPECS = tuple(
        dataclasses.replace(ONE, name=name, digest=name, num_virtual_tokens=number * BLOCK_SIZE)
        for name, number in (("a", 1), ("b", 3), ("c", 6))
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = CountingPool(self.random.choice([12, 30]))
        self.pinned = pinned_blocks(self.pool, self.random.choice([1, 3, 1000]))
        self.never_safe = self.pinned._blocks_per_step == 1000
        self.running: list[list[Any]] = []
        # Of each pinned prefix, the block that a request was given last at each position.
        self.kept: dict[str, dict[int, tuple[Any, Any]]] = {}
        self.number = 0

    def admit(self) -> None:
        spec = self.random.choice([*self.SPECS, None])
        num_prefix = spec.num_virtual_tokens // BLOCK_SIZE if spec is not None else 0
        num_text = self.random.randint(0, 4)
        blocks: list[Any] = []
        if spec is not None:
            for index in range(num_prefix):
                key = make_block_hash_with_group_id(f"{spec.name} {index}".encode(), 0)  # type: ignore[arg-type]
                if (block := self.pool.cached_block_hash_to_block.get_one_block(key)) is None:
                    break
                blocks.append(block)
        num_free = self.pool.get_num_free_blocks() - sum(block.ref_cnt == 0 for block in blocks)
        if num_prefix + num_text - len(blocks) > num_free:
            return
        self.pinned.before_request(0)
        self.pool.touch(blocks)
        for index in range(len(blocks), num_prefix):
            key = make_block_hash_with_group_id(f"{spec and spec.name} {index}".encode(), 0)  # type: ignore[arg-type]
            (block,) = self.pool.get_new_blocks(1)
            self.pool._insert_block_hash(key, block, num_tokens=(index + 1) * BLOCK_SIZE)
            blocks.append(block)
        self.number += 1
        blocks += self.pool.fill(num_text, f"text {self.number}", behind=num_prefix)
        self.running.append(blocks)
        if spec is not None:
            self.pinned.add(spec, "", (blocks,))
            kept = self.kept.setdefault(spec.name, {})
            kept.update({index: (blocks[index], blocks[index].block_hash) for index in range(num_prefix)})

    def end(self) -> None:
        if self.running:
            self.pool.release(self.running.pop(self.random.randrange(len(self.running))))

    def unload(self) -> None:
        name = self.random.choice(self.SPECS).name
        self.pinned.remove(name)
        self.kept.pop(name, None)

    def fail(self) -> None:
        free = self.pool.free_block_queue.get_all_free_blocks()
        self.pool.evict_blocks({block.block_id for block in free if self.random.random() < 0.2})
        # Until then, a block without content stays among those of prefixes.
        self.pinned.refresh()

    def reset(self) -> None:
        if not self.running:
            assert self.pool.reset_prefix_cache()

    def step(self) -> None:
        events = [self.admit] * 6 + [self.end] * 6 + [self.unload, self.fail, self.reset, self.pinned.refresh]
        for _ in range(self.random.randint(1, 4)):
            self.random.choice(events)()
        self.pinned.next_step()
        self.check()

    def check(self) -> None:
        queue = self.pool.free_block_queue
        free = queue.get_all_free_blocks()
        assert len(free) == self.pool.get_num_free_blocks() == sum(block.ref_cnt == 0 for block in self.pool.blocks[1:])
        backwards, block = [], queue.fake_free_list_tail.prev_free_block
        while block is not queue.fake_free_list_head:
            backwards.append(block)
            block = block.prev_free_block
        assert [block.block_id for block in reversed(backwards)] == [block.block_id for block in free]
        ours = {
            block.block_id
            for blocks in self.kept.values()
            for block, hash_ in blocks.values()
            if block.ref_cnt == 0 and block.block_hash == hash_
        }
        if self.never_safe:
            assert {block.block_id for block in free[len(free) - len(ours) :]} == ours


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_they_are_the_last_of_the_queue(seed: int) -> None:
    engine = Random(seed)
    for _ in range(100):
        engine.step()
