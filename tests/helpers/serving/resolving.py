"""The names of an engine's adapters, as one process of a server resolves them; without an engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import support
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters import file_state, loading, whole_files
from vllm_plugin.adapters.digest_cache import DigestCache
from vllm_plugin.adapters.loading import register_adapters
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter, Registry, registry_in
from vllm_plugin.adapters.resolver import Resolver
from vllm_plugin.adapters.sources import Source

CONFIG = support.llama_config()


@pytest.fixture
def config(model: Path) -> Any:
    """The config of an engine without adapters."""
    from vllm.engine.arg_utils import EngineArgs

    args = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32"}
    return EngineArgs(**args, **prefix_adapters({})).create_engine_config()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files are old enough for their times to be trusted, and no earlier test has read them."""
    monkeypatch.setattr(file_state, "SETTLING_NS", 0)
    monkeypatch.setattr(whole_files, "STILL_NS", 0)
    cache = DigestCache(tmp_path / "digests.jsonl")
    monkeypatch.setattr(loading, "digest_cache", lambda: cache)


def write(folder: Path, seed: int, *, tokens: int = 4, nan: bool = False, **overrides: Any) -> Path:
    prefix = support.random_prefix(CONFIG, tokens, seed=seed)
    if nan:
        prefix[0][0][0, 0, 0] = float("nan")
    support.write_adapter(folder, CONFIG, prefix, **overrides)
    time.sleep(0.001)
    return folder


def write_lookalike(folder: Path, kind: str = "PREFIX_EXT") -> Path:
    """Writes what looks like an adapter to those who read no further than its type."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    time.sleep(0.001)
    return folder


class Names:
    """The names of one engine, seen by one process, with a clock that tests turn."""

    def __init__(
        self, config: Any, *sources: Source, prepare: Callable[[Adapter], None] = lambda adapter: None
    ) -> None:
        self.config, self.now = config, 0.0
        found = registry_in(config.kv_transfer_config)
        assert found is not None
        # Each process reads the journal by itself.
        self.registry = Registry(found.folder)
        self.resolver = Resolver(self.registry, config, sources, prepare, lambda: self.now)

    def register(self, **folders: Path) -> None:
        options = [AdapterOption(name, str(folder)) for name, folder in folders.items()]
        self.registry.add(register_adapters(options, self.config))

    def tokens(self, name: str) -> int | None:
        """Asks for a name as a request does, and returns the length of its prefix."""
        adapter = self.resolver.resolve(name)
        assert adapter is None or adapter.is_verified
        return None if adapter is None else adapter.spec.num_virtual_tokens

    def later(self, name: str) -> int | None:
        self.now += 1.01
        return self.tokens(name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders whose values were read."""
    found: list[str] = []
    original = loading.read_prefix
    monkeypatch.setattr(loading, "read_prefix", lambda folder: found.append(Path(folder).name) or original(folder))
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"
