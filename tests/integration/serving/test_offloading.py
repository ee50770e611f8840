"""Prefixes beside vLLM's offloading connector, which stores blocks outside of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from helpers.serving import offloading, support
from helpers.serving.engines import Engine, Pool, file_gone
from helpers.serving.support import prompt_ids


@pytest.fixture(scope="module")
def offloaded(pool: Pool) -> Iterator[Engine]:
    """A Llama engine whose blocks are offloaded."""
    yield pool.start(support.llama_config(), kv_transfer_config=offloading.CONNECTOR)
    pool.close()


def worker() -> Any:
    return get_kv_transfer_group().sub_connectors[1].connector_worker.worker


def test_prefixes_and_offloaded_text(offloaded: Engine) -> None:
    names = [None, "p32", "p33", "p7", "p130", None, "p32"]
    prompts = [prompt_ids(70 + seed, seed=seed) for seed in range(len(names))]
    for _ in range(3):
        offloaded.check(names, prompts)
        assert offloaded.llm.reset_prefix_cache()
    assert worker().num_stored
    assert worker().num_loaded
    assert offloaded.llm.reset_prefix_cache(reset_connector=True)
    offloaded.check(names, prompts)


def test_text_after_a_prefix_is_loaded_back(offloaded: Engine) -> None:
    prompt = prompt_ids(100, seed=20)
    offloaded.check(["p32"], [prompt])
    before = worker().num_loaded
    offloaded.llm.reset_prefix_cache()
    # Once the prefix is in the cache, the offloaded blocks after it are loaded.
    offloaded.check(["p32"], [prompt_ids(5, seed=21)])
    assert worker().num_loaded == before
    offloaded.check(["p32"], [prompt])
    assert worker().num_loaded == before + 3


def test_blocks_computed_after_a_missing_prefix_are_not_offloaded(
    offloaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offloaded.llm.reset_prefix_cache()
    prompt, other = prompt_ids(100, seed=30), prompt_ids(5, seed=31)
    with file_gone(offloaded, "p32", monkeypatch):
        (output,) = offloaded.generate(["p32"], [prompt])
        assert output.outputs[0].finish_reason == "error"
    offloaded.check([None, "p32"], [other, other])
    offloaded.check(["p32"], [prompt])


def test_prefixes_and_offloaded_text_where_layers_have_windows(pool: Pool) -> None:
    engine = pool.start(support.gemma3_config(), kv_transfer_config=offloading.CONNECTOR)
    names = [None, "p32", "p33", "p130", None, "p32"]
    prompts = [prompt_ids(90 + 20 * seed, seed=seed) for seed in range(len(names))]
    for _ in range(3):
        engine.check(names, prompts)
        assert engine.llm.reset_prefix_cache()
        engine.check(["p32", "p130"], [prompt_ids(5, seed=50)] * 2)
    assert worker().num_stored
    assert worker().num_loaded
    pool.close()
