"""Calls that many ask for at once and that run once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs one call per key at a time in threads of its own. Who asks meanwhile gets the same result.

    Args:
        max_workers: How many calls run at once.
    """

    def __init__(self, max_workers: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="prefix-adapters")
        self._flights: dict[str, Future[T]] = {}
        self._lock = threading.Lock()

    def start(self, key: str, call: Callable[[], T]) -> Future[T]:
        """Returns the future of the call of this key that is running or waiting, or else of a new one.

        The future belongs to all who asked: wait for it, but do not cancel it.
        """
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = self._pool.submit(self._run, key, call)
            return flight

    def _run(self, key: str, call: Callable[[], T]) -> T:
        try:
            return call()
        finally:
            # Before its result is known: who asks afterwards wants a new one.
            with self._lock:
                del self._flights[key]
