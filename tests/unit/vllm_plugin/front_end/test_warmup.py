"""Adapters that are in the cache before a server is ready."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from helpers.serving.app import adapter, digest, start
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end import serving_models

pytestmark = pytest.mark.usefixtures("settled")


def ready(server_options: Any) -> tuple[TestClient, list[str]]:
    """Starts a server whose engine answers, and returns the names that it was asked for."""
    asked: list[str] = []
    original = serving_models.PrefixModels.__init__

    async def generate(prompt: Any, params: Any, request_id: str, *, lora_request: Any, data_parallel_rank: Any) -> Any:
        asked.append(lora_request.spec.name)
        assert lora_request.spec.digest
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length")])

    def with_engine(self: Any, models: Any) -> None:
        models.engine_client.generate = generate
        original(self, models)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_models.PrefixModels, "__init__", with_engine)
        return start(server_options), asked


def test_a_few_adapters_are_warmed_up(options: Any, root: Path, reads: list[str]) -> None:
    adapter(root / "a", 1)
    adapter(root / "b", 2)
    options.prefix_adapter_warmup = ["a", "one"]
    server, asked = ready(options)
    assert sorted(asked) == ["a", "one"]
    assert sorted(reads) == ["a", "one"]
    # Only these.
    assert digest(server, "b")
    assert sorted(asked) == ["a", "one"]
    options.prefix_adapter_warmup, options.prefix_registry = ["nobody"], None
    with pytest.raises(PrefixServeError, match="--prefix-adapter-warmup names 'nobody', and there is no such adapter"):
        ready(options)


def test_all_adapters_are_warmed_up(options: Any, root: Path) -> None:
    adapter(root / "a", 1)
    options.prefix_adapter_warmup = []
    server, asked = ready(options)
    assert asked == ["one"]
    assert digest(server, "a")
    assert digest(server, "a")
    assert asked == ["one", "a"]
