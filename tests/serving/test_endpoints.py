"""The endpoints that load and unload adapters: vLLM's own app without an engine, as two API server processes see it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serving import support
from vllm_plugin import models as prefix_models
from vllm_plugin.endpoints import SWITCH
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.registry import registry_at

CONFIG = support.llama_config()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_model(tmp_path_factory.mktemp("endpoints") / "model", CONFIG)


def adapter(folder: Path, seed: int, **overrides: Any) -> Path:
    return support.write_adapter(folder, CONFIG, support.random_prefix(CONFIG, 4, seed=seed), **overrides)


@pytest.fixture
def options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parsed options of a server with one adapter."""
    monkeypatch.setenv(SWITCH, "1")
    option = f'{{"name": "one", "path": "{adapter(tmp_path / "one", 1)}", "base_model_name": "alias"}}'
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(
        [
            *("--model", str(model), "--served-model-name", "base", "alias", "--max-model-len", "256"),
            *("--skip-tokenizer-init", "--prefix-adapter", option),
        ]
    )


def start(options: Any, *loras: str) -> TestClient:
    """Builds the app of one API server process, up to where its engine would answer."""
    registry_at.cache_clear()
    config = AsyncEngineArgs.from_cli_args(options).create_engine_config()
    engine = SimpleNamespace(vllm_config=config, model_config=config.model_config, renderer=None, input_processor=None)
    models = OpenAIServingModels(engine, [BaseModelPath(name, options.model) for name in options.served_model_name])
    models.lora_requests = {name: LoRARequest(name, 1, "/lora") for name in loras}
    asyncio.run(models.init_static_loras())
    app = build_app(options, ("generate",), config.model_config)
    app.state.openai_serving_models = models
    return TestClient(app)


@pytest.fixture
def server(options: Any) -> TestClient:
    return start(options)


@pytest.fixture
def other(server: TestClient, options: Any) -> TestClient:
    return start(options)


def load(server: TestClient, name: str, path: Any, **more: Any) -> Any:
    return server.post("/v1/load_prefix_adapter", json={"prefix_name": name, "prefix_path": str(path), **more})


def unload(server: TestClient, name: str) -> Any:
    return server.post("/v1/unload_prefix_adapter", json={"prefix_name": name})


def cards(server: TestClient) -> dict[str, Any]:
    return {card["id"]: card for card in server.get("/v1/models").json()["data"]}


def digest(server: TestClient, name: str) -> str | None:
    """Asks for a model as vLLM's handlers do, and returns the content they would run it with."""
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
    # The name alone brings nothing new: who asks for it goes on with what was checked.
    assert digest(server, "one") == before
    assert_refused(load(server, "one", tmp_path / "one"), 409, "set 'load_inplace' to True")
    assert load(server, "one", tmp_path / "one", load_inplace=True).status_code == 200
    assert digest(server, "one") == digest(other, "one") != before
    assert list(cards(other)) == ["base", "alias", "one"]


def test_a_link_is_followed_when_it_is_loaded(server: TestClient, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(adapter(tmp_path / "v1", 1))
    load(server, "linked", tmp_path / "current")
    models = server.app.state.openai_serving_models
    assert models.prefix_models.request("linked").spec.path == str(tmp_path / "v1")


@pytest.mark.parametrize(
    ("name", "path", "status", "message"),
    [
        ("", "{one}", 400, "Both 'prefix_name' and 'prefix_path' must be provided"),
        ("two", "", 400, "Both 'prefix_name' and 'prefix_path' must be provided"),
        ("base", "{one}", 409, "'base' conflicts with a served model"),
        ("alias", "{one}", 409, "'alias' conflicts with a served model"),
        ("a-lora", "{one}", 409, "'a-lora' conflicts with a served model"),
        ("one", "{one}", 409, "'one' has already been loaded"),
        ("../two", "{one}", 400, "name must be up to 256 letters"),
        ("two", "/nowhere", 404, "neither a folder nor a Hub repository"),
        ("two", "{tmp}", 404, "it is not a PEFT adapter"),
        ("two", "~nobody-here/x", 404, "No prefix adapter at"),
        ("two", "x" * 5000, 404, "No prefix adapter at"),
        ("two", "{truncated}", 400, "cannot be read as safetensors"),
        ("two", "{wrong_base}", 400, "was trained on another base model"),
        ("two", "{wrong_shape}", 400, "do not fit together"),
        ("two", "{not_finite}", 400, "holds NaN or Inf"),
        ("two", "{lora}", 400, "not a prefix"),
    ],
)
def test_a_refused_load_leaves_everything_as_it_was(
    options: Any, tmp_path: Path, name: str, path: str, status: int, message: str
) -> None:
    folders = {kind: tmp_path / kind for kind in ("truncated", "wrong_base", "wrong_shape", "not_finite", "lora")}
    weights = adapter(folders["truncated"], 2) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    adapter(folders["wrong_base"], 2, base_fingerprint={"hidden_size": 1})
    adapter(folders["wrong_shape"], 2, num_virtual_tokens=3)
    adapter(folders["lora"], 2, peft_type="LORA")
    prefix = support.random_prefix(CONFIG, 4)
    prefix[0][0][0, 0, 0] = float("nan")
    support.write_adapter(folders["not_finite"], CONFIG, prefix)
    server = start(options, "a-lora")
    before = cards(server).keys(), digest(server, "one")
    assert_refused(load(server, name, path.format(one=tmp_path / "one", tmp=tmp_path, **folders)), status, message)
    assert (cards(server).keys(), digest(server, "one")) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
STOCK = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 64}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), stock=st.booleans())
def test_whatever_an_adapter_holds_the_server_lives(
    server: TestClient, tmp_path: Path, data: st.DataObject, stock: bool
) -> None:
    folder = adapter(tmp_path / "fuzzed", 2, **({"peft_type": "PREFIX_TUNING", **STOCK} if stock else {}))
    if stock:
        save_file({"prompt_embeddings": torch.randn(4, 2 * 2 * 64)}, folder / "adapter_model.safetensors")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    fields, raw = json.loads(config.read_text()), bytearray(weights.read_bytes())
    if data.draw(st.booleans(), "damages the config"):
        place = data.draw(st.sampled_from([fields, *fields["prefix_layers"]]), "place")
        place[data.draw(st.sampled_from(sorted(place)), "field")] = data.draw(JSON, "value")
        config.write_text(json.dumps(fields))
    else:
        # The header, which says what there is and how much of it, comes first.
        for _ in range(data.draw(st.integers(1, 4), "bytes")):
            raw[data.draw(st.integers(0, 500), "position")] = data.draw(st.integers(0, 255), "byte")
        weights.write_bytes(raw[: data.draw(st.integers(0, len(raw)), "length")])
    response = load(server, "fuzzed", folder)
    if response.status_code == 200:
        assert unload(server, "fuzzed").status_code == 200
    else:
        assert_refused(response, 400, "Prefix adapter 'fuzzed'")
    assert list(cards(server)) == ["base", "alias", "one"]


def test_a_prefix_must_fit_the_layers_that_the_engine_has(server: TestClient, options: Any, tmp_path: Path) -> None:
    row = {"num_kv_heads": 2, "key_size": 32, "value_size": 32}
    layers = Path(options.prefix_registry) / "layers.json"
    new = adapter(tmp_path / "two", 2, base_fingerprint={})
    layers.write_text(json.dumps([{"index": 0, **row}, {"index": 1, **row, "value_size": 16}]))
    assert_refused(load(server, "two", new), 400, "layer 1 has 2 KV heads of sizes (32, 32), the model has 2 of sizes")
    layers.write_text(json.dumps([{"index": 0, **row}]))
    assert_refused(load(server, "two", new), 400, "without a cache: [1]")
    layers.write_text(json.dumps([{"index": 0, **row}, {"index": 1, **row}]))
    assert load(server, "two", new).status_code == 200


def test_a_prefix_that_the_engine_cannot_read_is_not_added(options: Any, tmp_path: Path) -> None:
    options.prefix_adapter, options.enable_prefix_adapters, options.prefix_adapter_warmup = None, True, True
    server = start(options)
    reasons = ["error", "length"]
    asked: list[str] = []

    async def generate(prompt: Any, params: Any, request_id: str, *, lora_request: Any, data_parallel_rank: Any) -> Any:
        asked.append(lora_request.spec.name)
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reasons.pop(0))])

    server.app.state.openai_serving_models.engine_client.generate = generate
    assert_refused(load(server, "one", tmp_path / "one"), 400, "'one' could not be read into the cache")
    assert digest(server, "one") is None
    assert load(server, "one", tmp_path / "one").status_code == 200
    assert asked == ["one", "one"]


def test_what_is_not_there_cannot_be_unloaded(server: TestClient) -> None:
    assert_refused(unload(server, "nobody"), 404, "'nobody' cannot be found")
    assert_refused(unload(server, "base"), 404, "'base' cannot be found")
    assert_refused(unload(server, ""), 400, "'prefix_name' needs to be provided")
    for body in ({}, {"prefix_name": 5}, {"name": "one"}, []):
        response = server.post("/v1/unload_prefix_adapter", json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "Bad Request")
    assert "one" in cards(server)


def test_loras_and_prefixes_stay_apart(options: Any) -> None:
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

    models = start(options, "a-lora").app.state.openai_serving_models
    for inplace in (False, True):
        request = LoadLoRAAdapterRequest(lora_name="one", lora_path="/lora", load_inplace=inplace)
        refusal = asyncio.run(models.load_lora_adapter(request))
        assert (refusal.error.code, refusal.error.message) == (
            400,
            "The lora adapter 'one' conflicts with a prefix adapter.",
        )
    refusal = asyncio.run(models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="one")))
    assert refusal.error.code == 404
    serving = BaseServing(models, models.model_config)
    assert serving._maybe_get_adapters(SimpleNamespace(model="a-lora")) == LoRARequest("a-lora", 1, "/lora")
    # An adapter is no default for messages that hold a part of its name.
    chat = SimpleNamespace(model="base", messages=[{"role": "user", "content": [{"type": "one"}]}])
    assert serving._maybe_get_adapters(chat, supports_default_mm_loras=True) is None


def test_a_name_of_a_lora_is_taken_at_start(options: Any) -> None:
    with pytest.raises(PrefixServeError, match="'one' is already the name of a model"):
        start(options, "one")


def test_a_request_that_has_found_its_adapter_keeps_it(server: TestClient) -> None:
    from vllm_plugin import serving

    models = server.app.state.openai_serving_models
    request = models.prefix_models.request("one")
    unload(server, "one")
    spec = serving.adapter_named(request, models.engine_client.vllm_config)
    assert spec is not None
    assert spec.name == "one"


def test_loads_of_one_name_at_a_time(server: TestClient, other: TestClient, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(4)]

    def attempt(number: int) -> int:
        return int(load((server, other)[number % 2], "same", folders[number]).status_code)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, range(4))) == [200, 409, 409, 409]
    assert digest(server, "same") == digest(other, "same") is not None


def test_loading_does_not_hold_up_the_event_loop(
    server: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = server.app.state.openai_serving_models.prefix_models
    threads: list[int] = []
    original = prefix_models.open_adapter
    monkeypatch.setattr(
        prefix_models, "open_adapter", lambda *args: threads.append(threading.get_ident()) or original(*args)
    )
    asyncio.run(models.load("two", str(adapter(tmp_path / "two", 2)), replace=False))
    assert threads != [threading.get_ident()]


def test_an_operator_switches_the_endpoints_on(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "", "no"):
        monkeypatch.setenv(SWITCH, value)
        server = start(options)
        assert load(server, "two", "/x").status_code == unload(server, "one").status_code == 404
        assert "one" in cards(server)
    monkeypatch.setenv(SWITCH, "1")
    options.prefix_adapter = options.prefix_registry = None
    assert load(start(options), "two", "/x").status_code == 404


def test_what_speaks_to_the_endpoints_of_lora_speaks_to_these(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
