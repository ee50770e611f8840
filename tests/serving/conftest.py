"""Engines for the tests of the serving half: in this process, where tests can look into them, one at a time; a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from serving import server, support
from serving.engines import Engine, Pool


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory)
    yield pool
    pool.close()


@pytest.fixture
def engine_factory(pool: Pool) -> Callable[..., Engine]:
    """Starts an engine of a kind of its own, as `engines.make_engine` does."""
    return pool.start


@pytest.fixture
def llama(pool: Pool) -> Engine:
    """A Llama engine with an empty prefix cache and fresh counters."""
    engine = pool.shared(support.llama_config)
    assert engine.llm.reset_prefix_cache()
    engine.forget_counts()
    return engine


@pytest.fixture(scope="package")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server.write_models(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="package")
def client(server_folder: Path) -> Iterator[openai.OpenAI]:
    with server.serve(server_folder) as client:
        yield client
