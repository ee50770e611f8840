"""Engines shared by the tests of the serving half: each takes seconds to start, so one per session and kind."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from serving import support
from serving.engines import Engine, make_engine

pytest.importorskip("vllm")

# Read when an engine starts: no compiler, a small cache, and the engine in this process, where tests can look into it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def engine_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """Starts further engines, each in a folder of its own."""
    return lambda config, *args, **kwargs: make_engine(tmp_path_factory.mktemp("engine"), config, *args, **kwargs)


@pytest.fixture(scope="session")
def llama_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("llama"), support.llama_config())


@pytest.fixture
def llama(llama_engine: Engine) -> Engine:
    """A Llama engine with an empty prefix cache and fresh counters."""
    assert llama_engine.llm.reset_prefix_cache()
    llama_engine.stats.loads.clear()
    llama_engine.stats.loaded_tokens.clear()
    return llama_engine
