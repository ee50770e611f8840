"""Vision-language models with prefixes: text, and pictures behind the prefix, token by token as in `PeftModel.generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.architectures import forget_engine
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool
from helpers.serving.served import MULTIMODAL_IMAGES, MULTIMODAL_TEXT
from helpers.serving.vision import ServedVision

# Chunks of 32 tokens, which end within pictures, and too few blocks for all requests at once.
CRAMPED = {"max_num_batched_tokens": 32, "max_num_seqs": 8}


@pytest.fixture
def serve(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    avoid_defects(monkeypatch)
    served: list[ServedVision] = []

    def start(name: str, **settings: Any) -> ServedVision:
        served.append(ServedVision(name, tmp_path, **settings))
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


def check_cold_warm_and_after_reset(served: ServedVision) -> None:
    served.check_cases_differ()
    served.check()
    served.check()
    assert served.llm.reset_prefix_cache()
    served.check()


@pytest.mark.parametrize(
    "name", [MULTIMODAL_IMAGES[0], *(pytest.param(name, marks=pytest.mark.soak) for name in MULTIMODAL_IMAGES[1:])]
)
def test_pictures_in_chunks_and_preempted(name: str, serve: Callable[..., ServedVision]) -> None:
    # A recurrent layer takes blocks of its own.
    served = serve(name, pictures=True, **CRAMPED, num_gpu_blocks_override=12 if name == "qwen3_5" else 10)
    split, preempted = watch(served.scheduler)
    check_cold_warm_and_after_reset(served)
    assert split
    assert preempted


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "settings"),
    [("qwen3_vl", {}), ("qwen2_5_vl", {"mm_processor_cache_gb": 0}), ("mistral3", {"enable_prefix_caching": False})],
)
def test_pictures(name: str, settings: dict[str, Any], serve: Callable[..., ServedVision]) -> None:
    check_cold_warm_and_after_reset(serve(name, pictures=True, **settings))


@pytest.mark.soak
@pytest.mark.parametrize("name", MULTIMODAL_TEXT)
def test_text_alone(name: str, serve: Callable[..., ServedVision]) -> None:
    check_cold_warm_and_after_reset(serve(name, pictures=False))


def watch(scheduler: Any) -> tuple[list[str], list[str]]:
    """Returns the ids of requests that stopped within a picture, and of preempted ones, as the engine schedules them."""
    split: list[str] = []
    preempted: list[str] = []
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        split.extend(
            request.request_id
            for request in scheduler.running
            for where in (feature.mm_position for feature in request.mm_features)
            if where.offset < request.num_computed_tokens < where.offset + where.length
        )
        return output

    def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
    return split, preempted
