"""`/v1/models` lists what requests may use, and no longer what is gone: of very many adapters, and at once."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.app import adapter, cards, digest, load, refused, start
from vllm_plugin.adapters import folder_index
from vllm_plugin.adapters.pinned_names import PinnedNames
from vllm_plugin.adapters.sources import FolderSource

pytestmark = pytest.mark.usefixtures("settled")


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


def test_an_adapter_whose_folder_is_gone_is_listed_no_more(options: Any, root: Path, tmp_path: Path) -> None:
    options.prefix_adapter_pinned = ["a"]
    for name in ("a", "b"):
        adapter(root / name, 2)
    adapter(root / ".versions" / "c", 3)
    (root / "c").symlink_to(root / ".versions" / "c")
    server, other = start(options), start(options)
    assert load(server, "loaded", adapter(tmp_path / "loaded", 4)).status_code == 200
    assert all(digest(server, name) for name in ("a", "b", "c"))
    registry = server.app.state.openai_serving_models.prefix_models._registry
    pinned = PinnedNames(str(registry.folder))
    assert pinned.current() == {"a"}
    assert sorted(cards(other)) == ["a", "alias", "b", "base", "c", "loaded", "one"]
    # Nobody asks for them any more, and the folder that the link leads to says nothing to the one of the link.
    for folder in (root / "a", root / ".versions" / "c", tmp_path / "loaded", tmp_path / "one"):
        shutil.rmtree(folder)
    # What the operator has named or loaded stays, and is in memory.
    for process in (other, server):
        assert sorted(cards(process)) == ["alias", "b", "base", "loaded", "one"]
    assert [each.spec.name for each in registry.adapters()] == ["one", "loaded", "b"]
    assert pinned.current() == set()
    error = refused(server, "a").error
    assert error.code == 404
    assert error.message.endswith("Prefix adapters: one, loaded, b.")
    adapter(root / "a", 2)
    adapter(root / ".versions" / "c", 3)
    assert sorted(cards(server)) == ["a", "alias", "b", "base", "c", "loaded", "one"]


def test_only_what_is_no_longer_listed_is_looked_for(options: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = range(2000)
    adapter(root / "a0", 1)
    server = start(options)
    assert digest(server, "a0")
    registry = server.app.state.openai_serving_models.prefix_models._registry
    first = registry.get("a0")
    for number in numbers[1:]:
        (root / f"a{number}").mkdir()
    registry.add(
        dataclasses.replace(
            first, spec=dataclasses.replace(first.spec, name=f"a{number}", source=str(root / f"a{number}"))
        )
        for number in numbers[1:]
    )
    time.sleep(0.001)
    monkeypatch.setattr(folder_index, "type_at_a_glance", lambda path: "PREFIX_EXT")
    looked: list[str] = []
    find = FolderSource.find
    monkeypatch.setattr(FolderSource, "find", lambda self, name: looked.append(name) or find(self, name))
    assert len(cards(server)) == 3 + len(numbers)
    assert looked == []
    (root / "a7").rmdir()
    assert len(cards(server)) == 2 + len(numbers)
    assert looked == ["a7"]
    models = server.app.state.openai_serving_models.prefix_models
    assert asyncio.run(models.cards()) is asyncio.run(models.cards())
    assert looked == ["a7"]
