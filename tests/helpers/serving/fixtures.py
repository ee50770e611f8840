"""Fixtures for serving that need no engine: a model, an adapter, a server's app."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from helpers.serving import app, support
from vllm_plugin.front_end.api_router import SWITCH


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return support.write_model(tmp_path_factory.mktemp("model") / "model", support.llama_config())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a prefix of 4 tokens for this model."""
    config = support.llama_config()
    return support.write_adapter(tmp_path / "adapter", config, support.random_prefix(config, 4))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log. vLLM's logger does not propagate by default, and is configured again with the first engine."""
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    monkeypatch.setitem(DEFAULT_LOGGING_CONFIG["loggers"]["vllm"], "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture
def options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parsed options of a server with one adapter, which may load others at run time."""
    monkeypatch.setenv(SWITCH, "1")
    return app.options(model, tmp_path)


@pytest.fixture
def server(options: Any) -> TestClient:
    return app.start(options)


@pytest.fixture
def other(server: TestClient, options: Any) -> TestClient:
    """Another API server process of that server."""
    return app.start(options)


@pytest.fixture
def storage() -> Iterator[Any]:
    """fsspec's file system in memory, `memory://`."""
    from fsspec.implementations.memory import MemoryFileSystem

    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
