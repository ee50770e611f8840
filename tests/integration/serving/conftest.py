"""Engines in the tests' own process, which can inspect them, one at a time; and a whole server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.fixtures import adapter, log, model, options, other, server  # noqa: F401
from helpers.serving.oracle import Oracle
from helpers.serving.server import PREFIXES, serve, write_models


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory)
    yield pool
    pool.close()


@pytest.fixture
def engine_factory(pool: Pool) -> Callable[..., Engine]:
    """Starts an engine with its own settings, as `engines.make_engine` does."""
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
def adapters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the server finds adapters by their names; empty between tests."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="package")
def client(server_folder: Path, adapters_folder: Path) -> Iterator[openai.OpenAI]:
    # A prefix of 200 tokens does not fit into this memory, and is read from its file for each request.
    memory = ("--prefix-adapter-device-memory", "0.00018")
    with serve(server_folder, *memory, "--prefix-adapter-dir", str(adapters_folder)) as client:
        yield client


@pytest.fixture
def root(adapters_folder: Path, client: openai.OpenAI) -> Iterator[Path]:
    """The folder where the server finds adapters, which is emptied after the test."""
    yield adapters_folder
    for path in adapters_folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert {each.id for each in client.models.list()} == {"base", *PREFIXES}


@pytest.fixture(scope="package")
def reference(server_folder: Path) -> support.Reference:
    return support.Reference(server_folder / "model")


@pytest.fixture(scope="package")
def oracle(server_folder: Path) -> Oracle:
    return Oracle(server_folder)
