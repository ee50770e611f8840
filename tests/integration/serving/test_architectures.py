"""The trainable architectures in vLLM: served exactly, or refused at the start with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.serving.architectures import Served, forget_engine
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool
from helpers.serving.served import EXACT, REFUSED, SMALL, SOAK, VARIANTS
from vllm_plugin.errors import PrefixServeError


@pytest.fixture
def serve(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    served: list[Served] = []

    def start(name: str, config: dict, **settings) -> Served:
        if "kv_lora_rank" in config:
            avoid_defects(monkeypatch)
        served.append(Served(name, tmp_path, config, **settings))
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAK)])
def test_same_tokens_as_peft_cold_and_warm(name: str, serve: Callable[..., Served]):
    served = serve(name, {**EXACT, **SOAK}[name])
    assert len({tuple(logprobs) for _, logprobs in served.expected}) == len(served.requests)
    served.check()
    served.check()


@pytest.mark.soak
@pytest.mark.parametrize("title", VARIANTS)
def test_variants_have_the_same_tokens(
    title: str, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers must not share threads.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if title.endswith("tensor-parallel") else "auto")
    name, config, settings = VARIANTS[title]
    served = serve(name, config, **settings)
    served.check()
    served.check()


@pytest.mark.parametrize("name", SMALL)
def test_same_tokens_after_chunks_preemption_and_reset(name: str, serve: Callable[..., Served]) -> None:
    config, settings = SMALL[name]
    served = serve(name, config, max_num_batched_tokens=48, max_num_seqs=8, **settings)
    served.check()
    served.check()
    assert served.llm.reset_prefix_cache()
    served.check()
    assert served.num_preemptions() > 0 or name == "llama4"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "minicpm3" else pytest.mark.soak) for name in REFUSED]
)
def test_is_refused_at_the_start(name: str, serve: Callable[..., Served]):
    why, config = REFUSED[name]
    with pytest.raises(PrefixServeError, match=why):
        serve(name, config)
