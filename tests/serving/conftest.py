"""Engines for the tests of the serving half: in this process, where tests can look into them, one at a time; a server, whole or its app."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from serving import app, support
from serving.engines import Engine, Pool
from serving.server import serve, write_models
from vllm_plugin.front_end.api_router import SWITCH


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return support.write_model(tmp_path_factory.mktemp("model") / "model", support.llama_config())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a prefix of 4 tokens for it."""
    config = support.llama_config()
    return support.write_adapter(tmp_path / "adapter", config, support.random_prefix(config, 4))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged; vLLM keeps its own from whoever else listens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


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
    return write_models(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="package")
def client(server_folder: Path) -> Iterator[openai.OpenAI]:
    # A prefix of 200 tokens does not fit into that much, and is read from its file for each request.
    with serve(server_folder, "--prefix-adapter-device-memory", "0.00018") as client:
        yield client


@pytest.fixture
def options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parsed options of a server with one adapter, which may be told to load others."""
    monkeypatch.setenv(SWITCH, "1")
    return app.options(model, tmp_path)


@pytest.fixture
def server(options: Any) -> TestClient:
    return app.start(options)


@pytest.fixture
def other(server: TestClient, options: Any) -> TestClient:
    """Another API server process of that server."""
    return app.start(options)
