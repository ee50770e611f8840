"""Metrics per adapter, from an engine to the Prometheus registry of vLLM's server.

In each step vLLM sums the counts of an engine's scheduler and workers, and passes them to its loggers in the front end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge, values
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Name and documentation of each count. All of them are per adapter.
COUNTS = {
    "requests": "Requests that ran with the prefix adapter.",
    "loads": "Copies of the prefix, or of the part that was not cached, into the KV cache.",
    "loaded_tokens": "Virtual tokens that those copies wrote.",
    "block_hits": "Full blocks of the prefix that a request found in the KV cache.",
}
RESIDENT, RESIDENCY = "resident", "residency"
# Adapters come and go at run time, but a Prometheus registry keeps every label forever.
MAX_LABELS, OTHERS = 10_000, "(others)"


class PrefixStats(KVConnectorStats):
    """Counts since the last report, `{count: {adapter: number}}`, and the resident prefixes, if they changed.

    These are the number of prefixes on the device (`RESIDENT`), and `{tier: {adapter: 1 or 0}}` of the adapters that came into
    a tier or left it (`RESIDENCY`).
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})

    def add(self, count: str, adapter: str, number: int = 1) -> None:
        if number:
            numbers = self.data.get(count)
            if numbers is None:
                numbers = self.data[count] = Counter()
            numbers[adapter] += number

    def change_residency(self, changes: Mapping[str, Mapping[str, int]]) -> None:
        # New dicts: statistics that were added up share theirs.
        before = self.data.get(RESIDENCY, {})
        self.data[RESIDENCY] = {
            tier: {**before.get(tier, {}), **changes.get(tier, {})} for tier in before.keys() | changes.keys()
        }

    def take(self) -> PrefixStats | None:
        """Returns the counts and starts again from zero; returns None if there are none."""
        if self.is_empty():
            return None
        taken = PrefixStats(self.data)
        self.reset()
        return taken

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> PrefixStats:
        for count, numbers in other.data.items():
            if count == RESIDENT:
                # All workers of an engine hold the same prefixes.
                self.data[count] = numbers
            elif count == RESIDENCY:
                self.change_residency(numbers)
            else:
                self.data[count] = Counter(self.data.get(count, {})) + Counter(numbers)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Returns the sums over all adapters, for vLLM's log."""
        totals = {f"prefix {count}": sum(self.data.get(count, {}).values()) for count in COUNTS}
        return totals | ({"prefixes resident": self.data[RESIDENT]} if RESIDENT in self.data else {})


class PrefixPromMetrics(KVConnectorPromMetrics):
    """`vllm:prefix_adapter_<count>_total{adapter="..."}`, and gauges of the resident prefixes: how many, and which ones."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            count: metric_types[PromCounter](
                name=f"vllm:prefix_adapter_{count}", documentation=documentation, labelnames=[*labelnames, "adapter"]
            )
            for count, documentation in COUNTS.items()
        }
        self._resident = metric_types[Gauge](
            name="vllm:prefix_adapters_resident",
            documentation="Prefixes on the device, ready to be copied into the KV cache.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        self._residency = metric_types[Gauge](
            name="vllm:prefix_adapter_residency",
            documentation="1 if the prefix is in this tier of the engine's memory, from where it is copied into the KV cache.",
            multiprocess_mode="mostrecent",
            labelnames=[*labelnames, "adapter", "tier"],
        )
        self._labels: set[str] = set()
        self._residents: set[tuple[object, ...]] = set()
        for labels in per_engine_labelvalues.values():
            self._resident.labels(*labels).set(0)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for count, numbers in transfer_stats_data.items():
            if count == RESIDENT:
                self._resident.labels(*labels).set(numbers)
                continue
            if count == RESIDENCY:
                for tier, changes in numbers.items():
                    for adapter, is_there in changes.items():
                        self._set_residency((*labels, adapter, tier), is_there)
                continue
            for adapter, number in numbers.items():
                self._counters[count].labels(*labels, self._label(adapter)).inc(number)

    def _set_residency(self, labels: tuple[object, ...], is_there: int) -> None:
        if labels not in self._residents:
            if not is_there or len(self._residents) >= MAX_LABELS:
                return
            self._residents.add(labels)
        if is_there:
            self._residency.labels(*labels).set(1)
        elif is_multiprocess() or not hasattr(self._residency, "remove"):
            # Nothing can be forgotten there, so the label keeps its place.
            self._residency.labels(*labels).set(0)
        else:
            self._residency.remove(*labels)
            self._residents.discard(labels)

    def _label(self, adapter: str) -> str:
        if len(self._labels) < MAX_LABELS:
            self._labels.add(adapter)
        return adapter if adapter in self._labels else OTHERS


def is_multiprocess() -> bool:
    """Returns whether several API servers share their metrics, by files in which no label is ever forgotten."""
    return values.ValueClass is not values.MutexValue
