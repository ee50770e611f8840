"""A server finds and reads adapters by the names in requests, in every one of its processes."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMNotFoundError

from helpers.serving import support
from helpers.serving.app import CONFIG, adapter, assert_refused, cards, digest, later, load, refused, start, unload
from vllm_plugin.adapters import loading, resolver

pytestmark = pytest.mark.usefixtures("settled")


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
