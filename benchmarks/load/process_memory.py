"""The memory of every process that this one has started, over time."""

from __future__ import annotations

import statistics
import threading
from typing import Any

import psutil

# Of the median of the last quarter to that of the second. vLLM's own worker on a CPU grows for minutes, by less and less,
# without prefixes, too: by 1.03 in 100 s of the same load on the base model alone.
FLAT = 1.1


class Memory:
    """Measures, while it is entered, the resident memory of all descendants that live throughout.

    Args:
        interval: Seconds between two measurements.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._measure)
        self._processes = psutil.Process().children(recursive=True)
        self._mib: dict[psutil.Process, list[float]] = {process: [] for process in self._processes}

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()

    def report(self) -> list[dict[str, Any]]:
        """Returns, per process, its medians in MiB of each quarter of the time, and how the last compares to the second."""
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
                    # One that ended early has a short series; the server's own never end.
                    continue


def is_flat(report: list[dict[str, Any]]) -> bool:
    """Whether there is a server, and none of its processes grows."""
    return bool(report) and all(row["growth"] <= FLAT for row in report)
