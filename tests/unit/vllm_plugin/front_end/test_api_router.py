"""The endpoints that load and unload adapters, as an operator and two API server processes see them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest

from helpers.serving.app import adapter, assert_refused, cards, digest, load, start, unload
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.api_router import SWITCH


def test_all_processes_see_what_is_loaded_and_unloaded_through_one(
    server: TestClient, other: TestClient, tmp_path: Path
) -> None:
    assert list(cards(other)) == ["base", "alias", "one"]
    response = load(server, "two", adapter(tmp_path / "two", 2))
    assert (response.status_code, response.text) == (200, "Success: Prefix adapter 'two' added successfully.")
    for process in (server, other):
        assert list(cards(process)) == ["base", "alias", "one", "two"]
        assert digest(process, "two") is not None
    response = unload(other, "one")
    assert (response.status_code, response.text) == (200, "Success: Prefix adapter 'one' removed successfully.")
    for process in (server, other):
        assert list(cards(process)) == ["base", "alias", "two"]
        assert digest(process, "one") is None
        assert digest(process, "base") is None


def test_cards_are_those_of_lora_modules(server: TestClient, tmp_path: Path) -> None:
    load(server, "two", adapter(tmp_path / "two", 2))
    found = cards(server)
    assert (found["one"]["parent"], found["two"]["parent"]) == ("alias", "base")
    assert found["two"]["root"] == str(tmp_path / "two")


def test_a_reload_in_place_is_another_content(server: TestClient, other: TestClient, tmp_path: Path) -> None:
    before = digest(other, "one")
    adapter(tmp_path / "one", 7)
    # Requests by name still get the content that was checked.
    assert digest(server, "one") == before
    assert_refused(load(server, "one", tmp_path / "one"), 409, "set 'load_inplace' to True")
    assert load(server, "one", tmp_path / "one", load_inplace=True).status_code == 200
    assert digest(server, "one") == digest(other, "one") != before
    assert list(cards(other)) == ["base", "alias", "one"]


def test_an_operator_pins_and_unpins(server: TestClient, other: TestClient, tmp_path: Path) -> None:
    def is_pinned(name: str) -> bool:
        assert digest(other, name) is not None
        return bool(other.app.state.openai_serving_models.prefix_models.spec(name).pinned)

    two = adapter(tmp_path / "two", 2)
    load(server, "two", two, pinned=True)
    load(server, "three", two)
    assert (is_pinned("one"), is_pinned("two"), is_pinned("three")) == (False, True, False)
    # A newer version stays as the one before, unless the operator says otherwise.
    for more, pinned in (({}, True), ({"pinned": False}, False), ({}, False), ({"pinned": True}, True)):
        assert load(server, "two", two, load_inplace=True, **more).status_code == 200
        assert is_pinned("two") == pinned
    assert load(server, "four", two, pinned="mostly").status_code == 400


def test_links_are_resolved_on_load(server: TestClient, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(adapter(tmp_path / "v1", 1))
    load(server, "linked", tmp_path / "current")
    models = server.app.state.openai_serving_models
    assert models.prefix_models.request("linked").spec.path == str(tmp_path / "v1")


def test_unknown_adapters_cannot_be_unloaded(server: TestClient) -> None:
    assert_refused(unload(server, "nobody"), 404, "'nobody' cannot be found")
    assert_refused(unload(server, "base"), 404, "'base' cannot be found")
    assert_refused(unload(server, ""), 400, "'prefix_name' needs to be provided")
    for body in ({}, {"prefix_name": 5}, {"name": "one"}, []):
        response = server.post("/v1/unload_prefix_adapter", json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "Bad Request")
    assert "one" in cards(server)


def test_loras_and_prefixes_stay_apart(options: Any) -> None:
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    models = start(options, "a-lora").app.state.openai_serving_models
    for inplace in (False, True):
        request = LoadLoRAAdapterRequest(lora_name="one", lora_path="/lora", load_inplace=inplace)
        refusal = asyncio.run(models.load_lora_adapter(request))
        assert (refusal.error.code, refusal.error.message) == (
            400,
            "The lora adapter 'one' conflicts with a prefix adapter.",
        )
    serving = BaseServing(models, models.model_config)
    assert serving._maybe_get_adapters(SimpleNamespace(model="a-lora")) == LoRARequest("a-lora", 1, "/lora")
    # Message types do not select an adapter of the same name.
    chat = SimpleNamespace(model="base", messages=[{"role": "user", "content": [{"type": "one"}]}])
    assert serving._maybe_get_adapters(chat, supports_default_mm_loras=True) is None


def test_a_server_without_prefixes_refuses_one_that_is_loaded_as_a_lora(options: Any, tmp_path: Path) -> None:
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    models = start(options).app.state.openai_serving_models
    del models.prefix_models
    request = LoadLoRAAdapterRequest(lora_name="two", lora_path=str(adapter(tmp_path / "two", 2)))
    refusal = asyncio.run(models.load_lora_adapter(request))
    assert (refusal.error.code, refusal.error.message) == (
        400,
        "The lora adapter 'two' is a prefix, not a LoRA; start the server with --enable-prefix-adapters to load prefixes.",
    )


def test_loading_a_lora_as_a_prefix_names_the_right_endpoint(server: TestClient, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", 2, peft_type="LORA")
    assert_refused(load(server, "two", lora), 400, "is of type 'LORA', not a prefix")
    assert_refused(load(server, "two", lora), 400, "at run time by POST /v1/load_lora_adapter, and offline with")


def test_the_name_of_a_lora_is_refused_at_start(options: Any) -> None:
    with pytest.raises(PrefixServeError, match="'one' is already the name of a model"):
        start(options, "one")


def test_a_request_keeps_its_adapter_after_unload(server: TestClient) -> None:
    from vllm_plugin.front_end import requests

    models = server.app.state.openai_serving_models
    assert digest(server, "one") is not None
    request = models.prefix_models.request("one")
    unload(server, "one")
    spec = requests.adapter_named(request, models.engine_client.vllm_config)
    assert spec is not None
    assert spec.name == "one"


def test_the_endpoints_are_disabled_by_default(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "", "no"):
        monkeypatch.setenv(SWITCH, value)
        server = start(options)
        for response in (load(server, "two", "/x"), unload(server, "one"), server.post("/v1/load_prefix_adapter")):
            assert_refused(response, 404, "start it with PREFIX_SERVE_ALLOW_RUNTIME_UPDATING=1 in its environment.")
        assert "one" in cards(server)
    monkeypatch.setenv(SWITCH, "1")
    options.prefix_adapter = options.prefix_registry = None
    assert load(start(options), "two", "/x").status_code == 404


def test_clients_of_the_lora_endpoints_work(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    server = start(options)
    body = {"lora_name": "two", "lora_path": str(adapter(tmp_path / "two", 2))}
    assert server.post("/v1/load_prefix_adapter", json=body).status_code == 200
    assert "two" in cards(server)
    assert server.post("/v1/unload_prefix_adapter", json={"lora_name": "two"}).status_code == 200
    assert "two" not in cards(server)


def test_the_key_of_the_server_guards_them(options: Any, tmp_path: Path) -> None:
    options.api_key = ["secret"]
    server = start(options)
    new = adapter(tmp_path / "two", 2)
    assert load(server, "two", new).status_code == unload(server, "one").status_code == 401
    server.headers["Authorization"] = "Bearer secret"
    assert load(server, "two", new).status_code == 200


def test_a_server_may_start_without_adapters(options: Any, tmp_path: Path) -> None:
    options.prefix_adapter, options.enable_prefix_adapters = None, True
    server = start(options)
    assert list(cards(server)) == ["base", "alias"]
    assert digest(server, "one") is None
    assert load(server, "one", tmp_path / "one").status_code == 200
    assert digest(server, "one") is not None
