"""What manages LoRA adapters manages prefixes: vLLM's endpoints, with the requests that controllers send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from helpers.serving.app import adapter, assert_refused, cards, digest, load, start
from vllm_plugin.front_end.lora_options import SWITCH, VLLM_SWITCH

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(params=[SWITCH, VLLM_SWITCH])
def server(request: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A server whose operator has set one of the two variables."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv(request.param, "1")
    return start(options)


def test_production_stack(server: TestClient, tmp_path: Path) -> None:
    """`operator/internal/controller/loraadapter_controller.go` of vllm-project/production-stack."""

    def registrations(name: str) -> list[str]:
        """What `getAdapterRegistrations` takes from `/v1/models`: the root of each adapter of this name."""
        models = server.get("/v1/models", headers={"Content-Type": "application/json"}).json()["data"]
        fields = {"id": str, "object": str, "created": int, "owned_by": str}
        assert all(isinstance(model[name], kind) for model in models for name, kind in fields.items())
        return [model["root"] for model in models if model["parent"] is not None and model["id"] == name]

    path = str(adapter(tmp_path / "two", 2))
    # `loadAdapter`
    body = {"lora_name": "two", "lora_path": path}
    assert server.post(LOAD, json=body).status_code == 200
    assert registrations("two") == [path]
    assert digest(server, "two")
    # `sendRequest` knows an adapter that is there by the status, the type and these words.
    again = server.post(LOAD, json=body)
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert "has already been loaded" in again.json()["error"]["message"]
    # `unloadAdapter`
    assert server.post(UNLOAD, json={"lora_name": "two"}).status_code == 200
    assert registrations("two") == []
    assert digest(server, "two") is None


def test_aibrix(server: TestClient, tmp_path: Path) -> None:
    """`pkg/controller/modeladapter/lora_client.go` and `python/aibrix/aibrix/openapi/engine/vllm.py` of vllm-project/aibrix."""

    def models() -> dict[str, bool]:
        return {model["id"]: True for model in server.get("/v1/models").json()["data"]}

    path = str(adapter(tmp_path / "qwen-lora-test", 2))
    assert "qwen-lora-test" not in models()
    # `loadAdapterCall`, and `request.model_dump()` of its runtime.
    assert server.post(LOAD, json={"lora_name": "qwen-lora-test", "lora_path": path}).status_code == 200
    assert models()["qwen-lora-test"]
    # `buildUnloadPayload`
    assert server.post(UNLOAD, json={"lora_name": "qwen-lora-test"}).status_code == 200
    assert "qwen-lora-test" not in models()
    # `UnloadLoraAdapterRequest.model_dump()` of its runtime.
    assert server.post(LOAD, json={"lora_name": "qwen-lora-test", "lora_path": path}).status_code == 200
    assert server.post(UNLOAD, json={"lora_name": "qwen-lora-test", "lora_int_id": None}).status_code == 200
    assert server.post(UNLOAD, json={"lora_name": "qwen-lora-test", "lora_int_id": None}).status_code == 404
    missing = server.post(LOAD, json={"lora_name": "x", "lora_path": str(tmp_path / "nowhere")})
    assert missing.status_code in (400, 404, 500)


def test_a_prefix_is_replaced_in_place(server: TestClient, tmp_path: Path) -> None:
    before = digest(server, "one")
    body = {"lora_name": "one", "lora_path": str(adapter(tmp_path / "two", 2)), "load_inplace": True}
    assert server.post(LOAD, json=body).status_code == 200
    assert digest(server, "one") not in (before, None)


def test_errors_are_those_of_prefixes(server: TestClient, tmp_path: Path) -> None:
    wrong = str(adapter(tmp_path / "wrong", 2, base_fingerprint={"hidden_size": 1}))
    assert_refused(server.post(LOAD, json={"lora_name": "two", "lora_path": wrong}), 400, "another base model")
    good = str(adapter(tmp_path / "good", 2))
    assert_refused(
        server.post(LOAD, json={"lora_name": "base", "lora_path": good}), 400, "conflicts with a served model"
    )
    assert_refused(
        server.post(LOAD, json={"lora_name": "a b", "lora_path": good}), 400, "name must be up to 256 letters"
    )
    assert list(cards(server)) == ["base", "alias", "one"]


def test_a_lora_stays_with_vllm(server: TestClient, tmp_path: Path, request: Any) -> None:
    lora = str(adapter(tmp_path / "lora", 2, peft_type="LORA"))
    assert_refused(load(server, "two", lora), 400, "at run time by POST /v1/load_lora_adapter, and offline with")
    answer = server.post(LOAD, json={"lora_name": "two", "lora_path": lora})
    # Its own endpoint has no engine here.
    vllms = request.node.callspec.params["server"] == VLLM_SWITCH
    message = "has no attribute 'add_lora'" if vllms else "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    assert message in answer.json()["error"]["message"]


def test_a_prefix_in_remote_storage(server: TestClient, tmp_path: Path, storage: Any) -> None:
    storage.put(str(adapter(tmp_path / "two", 2)), "/loras/two", recursive=True)
    assert server.post(LOAD, json={"lora_name": "two", "lora_path": "memory://loras/two"}).status_code == 200
    assert cards(server)["two"]["root"] == "memory://loras/two"
    assert digest(server, "two")


def test_vllms_endpoints_are_off_by_default(options: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SWITCH)
    server = start(options)
    for path in (LOAD, UNLOAD):
        body = {"lora_name": "two", "lora_path": str(adapter(tmp_path / "two", 2))}
        assert server.post(path, json=body).status_code == 404
    assert list(cards(server)) == ["base", "alias", "one"]


def test_the_folder_of_vllms_resolver_may_hold_either_kind(
    options: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VLLM_SWITCH, "1")
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(tmp_path / "both"))
    adapter(tmp_path / "both" / "prefix", 1)
    adapter(tmp_path / "both" / "lora", 1, peft_type="LORA")
    server = start(options)
    models = server.app.state.openai_serving_models
    asked: list[str] = []

    async def resolve_lora(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(models, "resolve_lora", resolve_lora)
    assert digest(server, "prefix")
    assert digest(server, "lora") is None
    # Whatever is no prefix is vLLM's.
    assert asked == ["lora"]
    assert list(cards(server)) == ["base", "alias", "one", "prefix"]
