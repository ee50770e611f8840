"""The blocks that requests had in the last steps, by which a failed load finds the requests it affects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_plugin.scheduler.load_failures import STEPS_IN_FLIGHT, RecentBlocks, recent_blocks_of


def request() -> Any:
    return SimpleNamespace()


def test_a_bad_block_expands_to_its_requests() -> None:
    recent = RecentBlocks()
    recent.add(request(), ([1, 2, 3], [8, 9]))
    recent.add(request(), ([1, 4], [0, 7]))
    recent.add(request(), ([5, 6], [0, 10]))
    assert recent.expand_to_requests({2}) == {1, 2, 3, 8, 9}
    # The first two requests have it. The null block does not count as shared.
    assert recent.expand_to_requests({1}) == {1, 2, 3, 4, 8, 9, 0, 7}
    assert recent.expand_to_requests({99}) == {99}


def test_blocks_of_all_recent_steps_count() -> None:
    recent, preempted = RecentBlocks(), request()
    recent.add(preempted, ([1, 2],))
    recent.next_step()
    # Other blocks after a preemption. When it ends, its first block has left a sliding window.
    recent.add(preempted, ([3, 4],))
    recent.add(preempted, ([0, 4, 5],))
    assert recent.expand_to_requests({1}) == {1, 2}
    assert recent.expand_to_requests({4}) == {0, 3, 4, 5}


def test_old_steps_are_forgotten() -> None:
    recent, long, short = RecentBlocks(), request(), request()
    recent.add(long, ([1, 2],))
    recent.add(short, ([3],))
    for _ in range(STEPS_IN_FLIGHT - 1):
        recent.next_step()
    recent.add(short, ([3, 4],))
    assert recent.expand_to_requests({1}) == {1, 2}
    assert recent_blocks_of(long) == ([1, 2],)
    recent.next_step()
    assert recent.expand_to_requests({1}) == {1}
    # Its blocks may belong to another request by now.
    assert recent_blocks_of(long) == ()
    assert recent_blocks_of(short) == ([3, 4],)
    assert len(recent) == 1
