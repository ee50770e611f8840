"""An engine keeps a pinned prefix in its cache and on its device where it drops another one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids
from vllm_plugin import PrefixAdapterRequest, remove_prefix_adapter
from vllm_plugin.adapters.runtime_loading import adapter_of
from vllm_plugin.scheduler.pinned_prefixes import _LOOK_SECONDS

# 17 blocks of 32 tokens, one of them vLLM's null block. Both prefixes fill two.
SMALL: dict[str, Any] = {"num_gpu_blocks_override": 17, "max_model_len": 512, "max_num_batched_tokens": 48}


@pytest.fixture(scope="module")
def shared(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine with two prefixes of 64 tokens: `kept` is pinned, `p64` is not."""
    config, folder = support.llama_config(), tmp_path_factory.mktemp("kept")
    prefix = support.random_prefix(config, 64, seed=1)
    support.write_adapter(folder, config, prefix)
    engine = pool.start(config, (64,), more={"kept": {"path": folder, "pinned": True}}, **SMALL)
    engine.prefixes["kept"] = prefix
    return engine


@pytest.fixture
def engine(shared: Engine) -> Engine:
    assert shared.llm.reset_prefix_cache()
    shared.forget_counts()
    return shared


def ask(engine: Engine) -> None:
    engine.check(["kept", "p64"], [prompt_ids(5)] * 2, max_tokens=2)


def fill_the_cache(engine: Engine, first_seed: int = 0) -> None:
    """Runs four requests to the base model, of five blocks each."""
    for seed in range(first_seed, first_seed + 4):
        engine.check([None], [prompt_ids(150, seed=seed)], max_tokens=2)


def test_a_pinned_prefix_survives_what_evicts_another(engine: Engine) -> None:
    ask(engine)
    for number in (1, 2):
        fill_the_cache(engine, 10 * number)
        assert engine.counts("loads") == {"kept": 1, "p64": number}
        ask(engine)
        assert engine.counts("block_hits") == {"kept": 2 * number}
    assert engine.counts("loads") == {"kept": 1, "p64": 3}


def test_a_pinned_prefix_makes_room_if_nothing_else_does(engine: Engine) -> None:
    ask(engine)
    # A request that needs all 16 blocks.
    engine.check([None], [prompt_ids(490)], max_tokens=4)
    ask(engine)
    assert engine.counts("loads") == {"kept": 2, "p64": 2}


def test_the_cache_is_reset_and_the_engine_sleeps(engine: Engine) -> None:
    ask(engine)
    assert engine.llm.reset_prefix_cache()
    ask(engine)
    assert engine.counts("loads") == {"kept": 2, "p64": 2}
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    ask(engine)
    fill_the_cache(engine)
    assert engine.counts("loads") == {"kept": 3, "p64": 3}
    ask(engine)
    assert engine.counts("loads") == {"kept": 3, "p64": 4}


def test_it_stays_on_the_device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    device = engine.writer._manager._on_device
    digests = {
        name: adapter_of(PrefixAdapterRequest(name), engine.llm.llm_engine.vllm_config).digest
        for name in ("kept", "p64")
    }
    ask(engine)
    # Room for one of the two.
    device.clear()
    monkeypatch.setattr(device, "capacity", 64 * 2 * 2 * 2 * 32 * 4)
    for name in ("p64", "kept", "p64"):
        assert engine.llm.reset_prefix_cache()
        engine.check([name], [prompt_ids(5)], max_tokens=2)
    assert device.get(digests["kept"]) is not None
    assert device.get(digests["p64"]) is None


def test_an_unloaded_adapter_is_evicted_like_any_other(engine: Engine) -> None:
    config = engine.llm.llm_engine.vllm_config
    spec = adapter_of(PrefixAdapterRequest("kept"), config)
    ask(engine)
    assert spec.digest in engine.writer._manager._pinned
    remove_prefix_adapter(engine.llm, "kept")
    time.sleep(_LOOK_SECONDS + 0.1)
    fill_the_cache(engine)
    # The same adapter, which would find the blocks.
    adapter_of(PrefixAdapterRequest("kept", path=spec.path), config)
    engine.check(["kept"], [prompt_ids(5)], max_tokens=2)
    assert engine.counts("loads") == {"kept": 2, "p64": 1}
    assert spec.digest not in engine.writer._manager._pinned
    assert not engine.bookkeeping.pinned
