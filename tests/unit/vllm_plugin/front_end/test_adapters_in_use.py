"""The metric that tells gateways which adapters are in use stays small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from vllm.v1.metrics.stats import SchedulerStats

from vllm_plugin.front_end import adapters_in_use
from vllm_plugin.kv_transfer_config import merge, settings


@pytest.fixture
def logger() -> Any:
    """What vLLM's logger has without LoRA."""
    registry = CollectorRegistry()
    config = SimpleNamespace(
        kv_transfer_config=merge(None, settings([])), scheduler_config=SimpleNamespace(max_num_seqs=8)
    )
    return SimpleNamespace(
        vllm_config=config, gauge_lora_info=None, _gauge_cls=lambda **fields: gauge(registry, fields), registry=registry
    )


def gauge(registry: CollectorRegistry, fields: dict[str, Any]) -> Gauge:
    return Gauge(registry=registry, **fields)


def record(logger: Any, stats: SchedulerStats) -> None:
    """What vLLM does in each step."""
    adapters_in_use.forget_sets(logger, stats)
    labels = {
        logger.labelname_running_lora_adapters: ",".join(stats.running_lora_adapters),
        logger.labelname_waiting_lora_adapters: ",".join(stats.waiting_lora_adapters),
        logger.labelname_max_lora: logger.max_lora,
    }
    logger.gauge_lora_info.labels(**labels).set_to_current_time()


def test_sets_of_adapters_are_forgotten(logger: Any) -> None:
    adapters_in_use.add_gauge(logger)
    for number in range(5 * adapters_in_use.MAX_SETS):
        record(logger, SchedulerStats(running_lora_adapters={f"a{number}": 1}))
    (metric,) = logger.registry.collect()
    assert 0 < len(metric.samples) <= adapters_in_use.MAX_SETS + 1
    latest = max(metric.samples, key=lambda sample: sample.value).labels
    assert latest == {
        "running_lora_adapters": f"a{number}",
        "waiting_lora_adapters": "",
        "max_lora": "8",
    }


def test_engines_without_prefixes_keep_what_they_have(logger: Any) -> None:
    logger.vllm_config.kv_transfer_config = None
    adapters_in_use.add_gauge(logger)
    assert logger.gauge_lora_info is None
    adapters_in_use.forget_sets(logger, SchedulerStats())
