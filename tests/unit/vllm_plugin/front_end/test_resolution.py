"""A server finds, reads and lists adapters by the names in requests, in every one of its processes."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMNotFoundError

from helpers.serving import support
from helpers.serving.app import CONFIG, adapter, assert_refused, cards, digest, load, start, unload
from vllm_plugin.adapters import folder_index, loading, resolver
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end import serving_models

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture
def root(tmp_path: Path, options: Any) -> Path:
    """The folder of `--prefix-adapter-dir`."""
    (tmp_path / "root").mkdir()
    options.prefix_adapter_dir = [str(tmp_path / "root")]
    return tmp_path / "root"


def refused(server: TestClient, name: str) -> Any:
    """Asks for a model as vLLM's handlers do, and returns the error."""
    models = server.app.state.openai_serving_models
    return asyncio.run(BaseServing(models, models.model_config)._check_model(SimpleNamespace(model=name)))


def later(server: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets two seconds go by in one process."""
    resolver = server.app.state.openai_serving_models.prefix_models._resolver
    clock = resolver._clock
    monkeypatch.setattr(resolver, "_clock", lambda: clock() + 2)


def test_a_named_adapter_is_read_with_its_first_request(options: Any, reads: list[str]) -> None:
    server = start(options)
    models = server.app.state.openai_serving_models
    assert list(cards(server)) == ["base", "alias", "one"]
    assert reads == []
    # Who does not ask first gets no adapter that was not read.
    serving = BaseServing(models, models.model_config)
    assert models.prefix_models.request("one") is None
    assert not serving._is_model_supported("one")
    assert digest(server, "one")
    assert models.prefix_models.request("one").spec.digest == digest(server, "one")
    assert digest(start(options), "one")
    assert reads == ["one"]


def test_a_named_adapter_that_is_bad(options: Any, tmp_path: Path) -> None:
    prefix = support.random_prefix(CONFIG, 4)
    prefix[0][0][0, 0, 0] = float("nan")
    support.write_adapter(tmp_path / "one", CONFIG, prefix)
    server = start(options)
    for _ in range(2):
        error = refused(server, "one").error
        assert (error.code, error.type) == (400, "InvalidUserInput")
        assert "holds NaN or Inf; train it again." in error.message
    assert refused(server, "base") is None
    # The operator puts it right.
    adapter(tmp_path / "one", 1)
    assert load(server, "one", tmp_path / "one", load_inplace=True).status_code == 200
    assert digest(server, "one")


def test_folders_come_change_and_go(
    options: Any, root: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    server = start(options)
    other = start(options)
    assert refused(server, "new").error.code == 404
    later(server, monkeypatch)
    adapter(root / "new", 1)
    first = digest(server, "new")
    assert first == digest(other, "new") is not None
    assert reads == ["new"]
    found = cards(other)
    assert (list(found), found["new"]["parent"], found["new"]["root"]) == (
        ["base", "alias", "one", "new"],
        "base",
        str(root / "new"),
    )
    adapter(root / "new", 2)
    time.sleep(0.001)
    for process in (server, other):
        later(process, monkeypatch)
        assert digest(process, "new") not in (first, None)
    shutil.rmtree(root / "new")
    for process in (server, other):
        later(process, monkeypatch)
        assert refused(process, "new").error.message.startswith("The model `new` does not exist.")
        assert list(cards(process)) == ["base", "alias", "one"]


def test_what_requests_may_use_is_listed(options: Any, root: Path) -> None:
    adapter(root / "b", 1)
    adapter(root / "a", 2)
    adapter(root / "one", 3)
    adapter(root / "lora", 4, peft_type="LORA")
    server = start(options)
    assert list(cards(server)) == ["base", "alias", "one", "a", "b"]
    assert cards(server)["a"]["root"] is None
    assert digest(server, "b")
    assert list(cards(server)) == ["base", "alias", "one", "b", "a"]
    # The operator's own `one` is another one.
    assert digest(server, "one") != digest(server, "a")


def test_a_list_of_very_many_models(options: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2000):
        (root / f"a{number}").mkdir()
    time.sleep(0.001)
    monkeypatch.setattr(folder_index, "type_at_a_glance", lambda path: "PREFIX_EXT")
    server = start(options)
    models = server.app.state.openai_serving_models
    found = cards(server)
    assert list(found)[:3] == ["base", "alias", "one"]
    assert found.keys() == {"base", "alias", "one", *(f"a{number}" for number in range(2000))}
    # As vLLM's own list, field by field.
    vllms = asyncio.run(models.show_available_models()).model_dump()["data"]
    assert [card.keys() for card in found.values()] == [vllms[0].keys()] * len(found)
    assert [{**found[card["id"]], "permission": 0, "created": 0} for card in vllms] == [
        {**card, "permission": 0, "created": 0} for card in vllms
    ]
    before = asyncio.run(models.prefix_models.cards())
    assert asyncio.run(models.prefix_models.cards()) is before
    (root / "a7").rmdir()
    assert len(cards(server)) == len(found) - 1


def test_a_list_that_takes_long_holds_up_nothing_else(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = start(options).app.state.openai_serving_models.prefix_models
    go = threading.Event()
    monkeypatch.setattr(models._resolver, "names", lambda: go.wait(30) and [])

    async def main() -> list[bytes]:
        # More than asyncio has threads.
        lists = [asyncio.create_task(models.cards()) for _ in range(40)]
        await asyncio.sleep(0.05)
        try:
            await asyncio.wait_for(asyncio.to_thread(go.is_set), 10)
        finally:
            go.set()
        return await asyncio.gather(*lists)

    assert b'"one"' in asyncio.run(main())[0]


def test_names_of_models_are_not_looked_for(options: Any, root: Path, reads: list[str]) -> None:
    for name in ("base", "alias", "a-lora"):
        adapter(root / name, 1)
    server = start(options, "a-lora")
    models = server.app.state.openai_serving_models
    assert digest(server, "base") is digest(server, "alias") is None
    assert refused(server, "a-lora") is None
    found = BaseServing(models, models.model_config)._maybe_get_adapters(SimpleNamespace(model="a-lora"))
    assert found.lora_path == "/lora"
    assert reads == []


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "..", "x" * 300, "a\0b", "~", "s3://x/y"])
def test_no_name_leads_outside(options: Any, root: Path, name: str) -> None:
    adapter(root.parent / "outside", 1)
    server = start(options)
    assert refused(server, name).error.code == 404
    assert refused(server, str(root.parent / "outside")).error.code == 404


def test_a_hundred_first_requests_read_once(options: Any, root: Path, reads: list[str]) -> None:
    adapter(root / "a", 1)
    models = start(options).app.state.openai_serving_models
    serving = BaseServing(models, models.model_config)

    async def ask() -> str:
        request = SimpleNamespace(model="a")
        assert await serving._check_model(request) is None
        return str(serving._maybe_get_adapters(request).spec.digest)  # type: ignore[union-attr]

    async def main() -> set[str]:
        return set(await asyncio.gather(*(ask() for _ in range(100))))

    assert len(asyncio.run(main())) == 1
    assert reads == ["a"]


def test_a_request_that_is_cancelled_leaves_the_others(
    options: Any, root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(root / "a", 1)
    models = start(options).app.state.openai_serving_models
    go, original = threading.Event(), loading.read_prefix
    monkeypatch.setattr(loading, "read_prefix", lambda folder: go.wait(10) and original(folder))

    async def main() -> Any:
        tasks = [asyncio.create_task(models.prefix_models.resolve("a")) for _ in range(3)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        go.set()
        return await asyncio.gather(*tasks[1:])

    assert {found.spec.name for found in asyncio.run(main())} == {"a"}


def test_reading_does_not_hold_up_the_event_loop(options: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(root / "a", 1)
    threads: list[int] = []
    for name in ("open_adapter", "verify_adapter"):
        call = getattr(resolver, name)
        monkeypatch.setattr(
            resolver, name, lambda *args, call=call: threads.append(threading.get_ident()) or call(*args)
        )
    server = start(options)
    assert digest(server, "a")
    assert digest(server, "one")
    assert len(threads) == 2
    assert threading.get_ident() not in threads


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


def test_unloading_what_lies_in_a_folder_is_for_the_moment(options: Any, root: Path) -> None:
    adapter(root / "a", 1)
    server = start(options)
    assert_refused(unload(server, "a"), 404, "'a' cannot be found")
    assert digest(server, "a")
    assert unload(server, "a").status_code == 200
    assert digest(server, "a")


def test_what_is_in_the_place_of_a_prefix_that_cannot_be_read(options: Any, root: Path) -> None:
    adapter(root / "a", 1)
    models = start(options).app.state.openai_serving_models.prefix_models

    def look_again(name: str) -> Any:
        async def main() -> Any:
            return await models.look_again(models.spec(name))

        return asyncio.run(main())

    for name in ("a", "one"):
        asyncio.run(models.resolve(name))
    assert look_again("one") is None
    # Its files were read again, and so the engine may read them as well.
    before = models.spec("a")
    assert look_again("a") == before
    adapter(root / "a", 2)
    time.sleep(0.001)
    # At once, and not after a second.
    assert look_again("a") == models.spec("a") != before
    # The prompt was rendered behind another opening.
    adapter(root / "a", 2, context={"chat_template": "{{ messages }}"})
    time.sleep(0.001)
    spec = models.spec("a")
    assert look_again("a") is None
    assert models.spec("a") != spec
    adapter(root / "a", 3, context={"chat_template": "{{ messages }}"})
    time.sleep(0.001)
    assert look_again("a") == models.spec("a")
    adapter(root / "a", 2, base_fingerprint={"hidden_size": 1})
    time.sleep(0.001)
    spec = models.spec("a")
    with pytest.raises(ValueError, match="another base model"):
        asyncio.run(models.look_again(spec))
    shutil.rmtree(root / "a")
    with pytest.raises(VLLMNotFoundError, match="`a` does not exist"):
        asyncio.run(models.look_again(spec))
