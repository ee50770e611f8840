"""CPU time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common.interleaving import Measurement


class Clock:
    """Measures the CPU time of this thread by stage, independent of other processes."""

    def __init__(self) -> None:
        self.microseconds: Measurement = {}

    @contextmanager
    def stage(self, name: str, number: int) -> Iterator[None]:
        started = time.thread_time_ns()
        yield
        self.microseconds[name] = (time.thread_time_ns() - started) / 1000 / number
