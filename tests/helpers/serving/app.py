"""vLLM's server app without an engine, as in one of several API server processes, and requests to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from helpers.serving import support
from vllm_plugin.adapters.registry import registry_at

CONFIG = support.llama_config()


def adapter(folder: Path, seed: int, **overrides: Any) -> Path:
    return support.write_adapter(folder, CONFIG, support.random_prefix(CONFIG, 4, seed=seed), **overrides)


def options(model: Path, folder: Path) -> Any:
    """Returns the parsed options of a server with one adapter, `one`."""
    option = f'{{"name": "one", "path": "{adapter(folder / "one", 1)}", "base_model_name": "alias"}}'
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(
        [
            *("--model", str(model), "--served-model-name", "base", "alias", "--max-model-len", "256"),
            *("--skip-tokenizer-init", "--prefix-adapter", option),
        ]
    )


def start(options: Any, *loras: str) -> TestClient:
    """Builds the app of one API server process, without its engine."""
    registry_at.cache_clear()
    config = AsyncEngineArgs.from_cli_args(options).create_engine_config()
    engine = SimpleNamespace(vllm_config=config, model_config=config.model_config, renderer=None, input_processor=None)
    models = OpenAIServingModels(engine, [BaseModelPath(name, options.model) for name in options.served_model_name])
    models.lora_requests = {name: LoRARequest(name, 1, "/lora") for name in loras}
    asyncio.run(models.init_static_loras())
    app = build_app(options, ("generate",), config.model_config)
    app.state.openai_serving_models = models
    return TestClient(app)


def load(server: TestClient, name: str, path: Any, **more: Any) -> Any:
    return server.post("/v1/load_prefix_adapter", json={"prefix_name": name, "prefix_path": str(path), **more})


def unload(server: TestClient, name: str) -> Any:
    return server.post("/v1/unload_prefix_adapter", json={"prefix_name": name})


def cards(server: TestClient) -> dict[str, Any]:
    return {card["id"]: card for card in server.get("/v1/models").json()["data"]}


def digest(server: TestClient, name: str) -> str | None:
    """Looks up a model as vLLM's handlers do, and returns the digest of its adapter."""
    models = server.app.state.openai_serving_models
    serving = BaseServing(models, models.model_config)
    request = SimpleNamespace(model=name)
    if (refusal := asyncio.run(serving._check_model(request))) is not None:
        assert refusal.error.code == 404
        return None
    found = serving._maybe_get_adapters(request)
    return found and found.spec.digest


def assert_refused(response: Any, status: int, message: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status)
    assert message in error["message"]
    assert "\n" not in error["message"]


def refused(server: TestClient, name: str) -> Any:
    """Asks for a model as vLLM's handlers do, and returns the error."""
    models = server.app.state.openai_serving_models
    return asyncio.run(BaseServing(models, models.model_config)._check_model(SimpleNamespace(model=name)))


def later(server: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets two seconds go by in one process."""
    resolver = server.app.state.openai_serving_models.prefix_models._resolver
    clock = resolver._clock
    monkeypatch.setattr(resolver, "_clock", lambda: clock() + 2)
