"""The KV cache of a GPU leaves room for prefixes, and a sleeping engine keeps none on its device."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_plugin.kv_transfer_config import CONNECTOR, DEFAULT_DEVICE_MEMORY, DEVICE_MEMORY
from vllm_plugin.patches import worker as worker_patches
from vllm_plugin.worker import device_memory

GIB = 1 << 30


def worker(settings: Mapping[str, Any] | None, kv_cache_memory_bytes: int | None = None) -> Any:
    """Returns what the patches read of vLLM's worker."""
    transfer = None if settings is None else SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=settings)
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes),
        vllm_config=SimpleNamespace(kv_transfer_config=transfer),
    )


@pytest.mark.parametrize(
    ("settings", "by_hand", "reserved"),
    [
        ({}, None, DEFAULT_DEVICE_MEMORY),
        ({DEVICE_MEMORY: 2 * GIB}, None, 2 * GIB),
        ({DEVICE_MEMORY: 0}, None, 0),
        # The operator says what the KV cache takes, so the rest is theirs to divide.
        ({}, 8 * GIB, 0),
        (None, None, 0),
    ],
)
def test_the_kv_cache_leaves_room_for_prefixes(
    settings: Mapping[str, Any] | None, by_hand: int | None, reserved: int
) -> None:
    given = worker(settings, by_hand)

    def profile() -> int:
        # A plan of an earlier start: vLLM takes it for the operator's number from here on.
        given.cache_config.kv_cache_memory_bytes = 8 * GIB
        return 8 * GIB

    assert worker_patches._determine_available_memory(profile, given, (), {}) == 8 * GIB - reserved


@pytest.mark.parametrize("beside_others", [False, True])
def test_prefixes_leave_the_device_before_the_engine_sleeps(
    monkeypatch: pytest.MonkeyPatch, beside_others: bool
) -> None:
    calls: list[Any] = []
    ours: Any = SimpleNamespace(release_device_memory=lambda: calls.append("released"))
    connector = SimpleNamespace(sub_connectors=[ours, object()]) if beside_others else ours
    monkeypatch.setattr(device_memory, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(device_memory, "get_kv_transfer_group", lambda: connector)
    worker_patches._sleep(lambda level: calls.append(level), worker({}), (2,), {})
    worker_patches._sleep(lambda level: calls.append(level), worker(None), (1,), {})
    assert calls == ["released", 2, 1]


def test_a_gpu_worker_is_patched_when_it_is_imported() -> None:
    import wrapt

    import vllm_plugin

    vllm_plugin.register()
    from vllm.v1.worker.gpu_worker import Worker

    for name in ("determine_available_memory", "sleep"):
        assert isinstance(vars(Worker)[name], wrapt.FunctionWrapper), name


def test_a_cpu_worker_has_methods_of_its_own() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert {"determine_available_memory", "sleep"} <= vars(CPUWorker).keys()
