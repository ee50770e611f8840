"""The resident memory of all child processes over time."""

from __future__ import annotations

import statistics
import threading
from typing import Any

import psutil

# The maximum ratio of the median of the last quarter to that of the second. vLLM's CPU worker grows for minutes, at a falling
# rate, even without prefixes: by 1.03 in 100 s of the same load on the base model alone.
MAX_GROWTH = 1.1


class MemoryMonitor:
    """A context manager that samples the resident memory of all descendant processes.

    Args:
        interval: Seconds between samples.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._measure)
        self._processes = psutil.Process().children(recursive=True)
        self._mib: dict[psutil.Process, list[float]] = {process: [] for process in self._processes}

    def __enter__(self) -> MemoryMonitor:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()

    def report(self) -> list[dict[str, Any]]:
        """Returns, for each process, the median of each quarter of the time in MiB, and the last over the second."""
        rows = []
        for process, series in self._mib.items():
            quarter = len(series) // 4
            if quarter == 0:
                continue
            medians = [statistics.median(series[index * quarter : (index + 1) * quarter]) for index in range(4)]
            rows.append(
                {
                    "process": self._names[process],
                    "MiB by quarter": [round(median, 1) for median in medians],
                    "growth": round(medians[3] / medians[1], 4),
                }
            )
        return rows

    def _measure(self) -> None:
        self._names = {process: f"{process.name()} {process.pid}" for process in self._processes}
        while not self._done.wait(self._interval):
            for process, series in self._mib.items():
                try:
                    series.append(process.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    # A process that ends early has a short series. The server's own do not end.
                    continue


def is_flat(report: list[dict[str, Any]]) -> bool:
    """Returns whether there are processes and none of them grows."""
    return bool(report) and all(row["growth"] <= MAX_GROWTH for row in report)
