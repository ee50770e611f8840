"""Counts per adapter, from an engine's step to the metrics of a server."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from vllm_plugin import metrics
from vllm_plugin.metrics import RESIDENT, PrefixPromMetrics, PrefixStats
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


def test_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 2)
    registry = CollectorRegistry()

    def on(kind: Any) -> Any:
        return lambda **arguments: kind(registry=registry, **arguments)

    counters = PrefixPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {kind: on(kind) for kind in (Counter, Gauge, Histogram)},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
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
