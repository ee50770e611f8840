"""Counts per adapter, from an engine's step to the metrics of a server."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from vllm_plugin import metrics
from vllm_plugin.metrics import RESIDENCY, RESIDENT, PrefixPromMetrics, PrefixStats
from vllm_plugin.patches.install import require


def counted(**counts: int) -> PrefixStats:
    counter = PrefixStats()
    for name, number in counts.items():
        counter.add(name, "a", number)
    return counter


def test_counts_of_a_step_add_up() -> None:
    worker, scheduler = PrefixStats({RESIDENT: 3}), counted(loads=2, requests=0)
    total = worker.aggregate(scheduler).aggregate(counted(loads=1, block_hits=4)).aggregate(PrefixStats({RESIDENT: 3}))
    assert total.to_dict() == {RESIDENT: 3, "loads": {"a": 3}, "block_hits": {"a": 4}}
    assert total.reduce() == {
        "prefix requests": 0,
        "prefix loads": 3,
        "prefix loaded_tokens": 0,
        "prefix block_hits": 4,
        "prefixes resident": 3,
    }
    assert not total.is_empty()
    total.reset()
    assert total.is_empty()


def test_stats_survive_serialization_in_a_multi_connector() -> None:
    """vLLM's `MultiConnector` rebuilds them from plain data, and finds their class by the connector's name alone."""
    require(server=False)
    data = json.loads(json.dumps({"PrefixConnector": counted(loads=2).to_dict()}))
    rebuilt = MultiConnector.build_kv_connector_stats(data)
    assert rebuilt.aggregate(MultiConnector.build_kv_connector_stats(data)).to_dict() == {
        "PrefixConnector": {"loads": {"a": 4}}
    }


def test_changes_of_residency_add_up() -> None:
    first = PrefixStats({RESIDENCY: {"device": {"a": 1, "b": 1}}})
    later = PrefixStats({RESIDENCY: {"device": {"a": 0}, "host": {"a": 1}}})
    total = PrefixStats().aggregate(first).aggregate(later)
    assert total.data == {RESIDENCY: {"device": {"a": 0, "b": 1}, "host": {"a": 1}}}
    assert first.data == {RESIDENCY: {"device": {"a": 1, "b": 1}}}
    assert not any(total.reduce().values())


def prometheus(registry: CollectorRegistry) -> PrefixPromMetrics:
    def on(kind: Any) -> Any:
        return lambda **arguments: kind(registry=registry, **arguments)

    return PrefixPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {kind: on(kind) for kind in (Counter, Gauge, Histogram)},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )


def residents(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.labels["engine"], sample.labels["tier"], sample.labels["adapter"]): sample.value
        for metric in registry.collect()
        if metric.name == "vllm:prefix_adapter_residency"
        for sample in metric.samples
    }


def test_residency_by_adapter_and_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters come and go for ever, and only those that are there have a label."""
    monkeypatch.setattr(metrics, "MAX_LABELS", 3)
    registry = CollectorRegistry()
    gauges = prometheus(registry)
    for number in range(10):
        names = {f"a{number}": 1} | ({f"a{number - 1}": 0} if number else {})
        gauges.observe({RESIDENCY: {"device": names, "host": {f"a{number}": 1, f"a{number - 1}": 0}}}, 1)
    assert residents(registry) == {("1", "device", "a9"): 1, ("1", "host", "a9"): 1}
    gauges.observe({RESIDENCY: {"device": {"b": 1, "c": 1, "never": 0}}}, 0)
    # There is room for three.
    assert residents(registry).keys() == {("0", "device", "b"), ("1", "device", "a9"), ("1", "host", "a9")}


def test_residency_where_labels_are_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "is_multiprocess", lambda: True)
    registry = CollectorRegistry()
    gauges = prometheus(registry)
    gauges.observe({RESIDENCY: {"device": {"a": 1}}})
    gauges.observe({RESIDENCY: {"device": {"a": 0}}})
    assert residents(registry) == {("0", "device", "a"): 0}


def test_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 2)
    registry = CollectorRegistry()
    counters = prometheus(registry)
    counters.observe({"loads": {"a": 2, 'b"': 1}, RESIDENT: 5}, 1)
    counters.observe({"loads": {"a": 1, "c": 1, "d": 1}}, 0)
    text = generate_latest(registry).decode()
    assert 'vllm:prefix_adapter_loads_total{adapter="a",engine="1",model_name="m"} 2.0' in text
    assert 'vllm:prefix_adapter_loads_total{adapter="b\\"",engine="1",model_name="m"} 1.0' in text
    assert 'vllm:prefix_adapter_loads_total{adapter="a",engine="0",model_name="m"} 1.0' in text
    # A Prometheus registry keeps every label forever.
    assert 'vllm:prefix_adapter_loads_total{adapter="(others)",engine="0",model_name="m"} 2.0' in text
    assert 'vllm:prefix_adapters_resident{engine="1",model_name="m"} 5.0' in text
    assert 'vllm:prefix_adapters_resident{engine="0",model_name="m"} 0.0' in text
