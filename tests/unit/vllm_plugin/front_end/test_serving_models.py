"""Loading an adapter while the server runs: it is read and checked completely, or nothing changes."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.serving import support
from helpers.serving.app import CONFIG, adapter, assert_refused, cards, digest, load, start, unload
from vllm_plugin.front_end import serving_models as prefix_models


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


@settings(max_examples=40)
@given(data=st.data(), stock=st.booleans())
def test_malformed_adapters_do_not_crash_the_server(
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
        # The header with names and sizes comes first.
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
