"""The names of what a worker's pools hold."""

from __future__ import annotations

import pytest
import torch

from vllm_plugin.worker.prefix_manager import LRUPool, PrefixKV
from vllm_plugin.worker.residency import Residency

PREFIX = PrefixKV((torch.zeros(1),), (torch.zeros(1),))


@pytest.fixture
def pool() -> LRUPool:
    """A pool with room for two prefixes."""
    return LRUPool(2 * PREFIX.nbytes)


class Worker:
    """Loads prefixes into one tier."""

    def __init__(self, pool: LRUPool) -> None:
        self.pool, self.residency = pool, Residency()

    def load(self, name: str, digest: str) -> dict[str, int]:
        self.residency.name(name, digest)
        if self.pool.get(digest) is None:
            assert self.pool.make_room(PREFIX.nbytes)
            self.pool.put(digest, PREFIX)
        return self.changes()

    def changes(self) -> dict[str, int]:
        return self.residency.take_changes({"device": self.pool}).get("device", {})


def test_names_come_and_go_with_their_content(pool: LRUPool) -> None:
    worker = Worker(pool)
    assert worker.load("a", "1") == {"a": 1}
    assert worker.load("a", "1") == {}
    # Two names of one content.
    assert worker.load("b", "1") == {"b": 1}
    assert worker.load("c", "2") == {"c": 1}
    assert worker.load("d", "3") == {"a": 0, "b": 0, "d": 1}
    pool.clear()
    assert worker.changes() == {"c": 0, "d": 0}
    assert len(worker.residency) == 0


def test_a_replaced_adapter_counts_for_its_new_content(pool: LRUPool) -> None:
    worker = Worker(pool)
    assert worker.load("a", "1") == {"a": 1}
    assert worker.load("a", "2") == {}
    # The old content goes.
    assert worker.load("b", "3") == {"b": 1}
    assert worker.load("c", "4") == {"a": 0, "c": 1}


def test_many_adapters_leave_nothing(pool: LRUPool) -> None:
    worker = Worker(pool)
    for number in range(100):
        worker.load(f"a{number}", str(number))
    assert len(worker.residency) == 2
