"""Adapters that are found by their names: they come, change and go with their folders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.resolving import Names, write
from vllm_plugin.adapters import file_state, loading
from vllm_plugin.adapters.sources import FolderSource, RemoteSource
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError

pytestmark = pytest.mark.usefixtures("settled")


def test_folders_come_change_and_go(config: Any, root: Path, reads: list[str]) -> None:
    source = FolderSource(str(root))
    names, other = Names(config, source), Names(config, source)
    assert names.tokens("a") is None
    write(root / "a", 1)
    # A name without an adapter is looked at again after a second.
    assert names.tokens("a") is None
    assert names.later("a") == other.tokens("a") == 4
    assert names.later("a") == 4
    assert reads == ["a"]
    # By way of another folder, so that it is never half of each.
    write(root / "new", 2, tokens=7)
    shutil.rmtree(root / "a")
    (root / "new").rename(root / "a")
    assert names.tokens("a") == 4
    assert names.later("a") == other.later("a") == 7
    # The same name and length, another content.
    digest = names.registry.get("a").spec.digest  # type: ignore[union-attr]
    write(root / "a", 3, tokens=7)
    assert names.later("a") == 7
    assert names.registry.get("a").spec.digest != digest  # type: ignore[union-attr]
    shutil.rmtree(root / "a")
    assert names.later("a") is None
    assert other.registry.adapters() == []
    assert other.tokens("a") is None


def test_files_that_are_only_touched_are_the_same_adapter(
    config: Any, root: Path, log: pytest.LogCaptureFixture
) -> None:
    log.set_level("INFO", "vllm")
    prepared: list[str] = []
    names = Names(config, FolderSource(str(root)), prepare=lambda adapter: prepared.append(adapter.spec.name))
    write(root / "a", 1)
    names.tokens("a")
    spec = names.registry.get("a").spec  # type: ignore[union-attr]
    (root / "a" / "adapter_model.safetensors").touch()
    time.sleep(0.001)
    assert names.later("a") == 4
    assert names.registry.get("a").spec == spec  # type: ignore[union-attr]
    assert prepared == ["a"]
    assert sum("Loaded prefix adapter" in record.getMessage() for record in log.records) == 1


def test_a_change_within_the_resolution_of_the_clock_is_noticed(
    config: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_state, "SETTLING_NS", 10**10)
    names = Names(config, FolderSource(str(root)))
    write(root / "a", 1)
    first = names.resolver.resolve("a")
    assert first is not None
    before = (root / "a" / "adapter_model.safetensors").stat()
    write(root / "a", 2)
    # As if the times were the same.
    real = file_state.os.stat
    monkeypatch.setattr(
        file_state.os,
        "stat",
        lambda path, **more: before if str(path).endswith("a/adapter_model.safetensors") else real(path),
    )
    names.now += 2
    second = names.resolver.resolve("a")
    assert second is not None
    assert second.spec.digest != first.spec.digest


def test_half_of_an_adapter_is_none_until_it_is_whole(config: Any, root: Path, log: pytest.LogCaptureFixture) -> None:
    names = Names(config, FolderSource(str(root)))
    whole = write(root.parent / "whole", 1)
    (root / "a").mkdir()
    assert names.tokens("a") is None
    for name, part in (("adapter_config.json", 0.5), ("adapter_config.json", 1.0), ("adapter_model.safetensors", 0.5)):
        content = (whole / name).read_bytes()
        (root / "a" / name).write_bytes(content[: int(part * len(content))])
        time.sleep(0.001)
        with contextlib.suppress(PrefixServeError):
            assert names.later("a") is None
    assert names.registry.adapters() == []
    shutil.copy(whole / "adapter_model.safetensors", root / "a")
    time.sleep(0.001)
    assert names.later("a") == 4


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "sparse"])
def test_what_is_no_file_holds_up_nothing(config: Any, root: Path, file: str, kind: str) -> None:
    names = Names(config, FolderSource(str(root)))
    path = write(root / "a", 1) / file
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            server.bind(str(path))
        else:
            with path.open("wb") as large:
                large.truncate(1 << 40)
        for ask in (names.tokens, names.later):
            with contextlib.suppress(PrefixServeError):
                assert ask("a") is None
    assert names.registry.adapters() == []
    assert FolderSource(str(root)).names() == (["a"] if file.endswith("safetensors") and kind != "device" else [])


def test_an_adapter_that_is_replaced_by_a_bad_one_is_gone(config: Any, root: Path) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root / "a", 1)
    assert names.tokens("a") == 4
    write(root / "a", 1, nan=True)
    for ask in (names.later, names.tokens, names.later):
        with pytest.raises(PrefixServeError, match="NaN"):
            ask("a")
    assert names.registry.adapters() == []
    write(root / "a", 1, peft_type="LORA")
    assert names.later("a") is None
    write(root / "a", 2)
    assert names.later("a") == 4


def test_other_adapters_and_bases_in_the_folder(config: Any, root: Path) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root / "lora", 1, peft_type="LORA")
    write(root / "other", 1, base_fingerprint={"hidden_size": 1})
    write(root / "long", 1, tokens=255)
    (root / "list").mkdir()
    (root / "list" / "adapter_config.json").write_text("[]")
    assert names.tokens("lora") is names.tokens("list") is None
    for name, message in (("other", "another base model"), ("long", "leaves no room")):
        with pytest.raises(PrefixServeError, match=message):
            names.tokens(name)


def test_requests_do_not_wait_for_remote_storage(config: Any, tmp_path: Path, storage: Any) -> None:
    names = Names(config, RemoteSource("memory://adapters"))
    storage.put(str(write(tmp_path / "a", 1)), "/adapters/a", recursive=True)
    assert names.tokens("a") == 4
    spec = names.registry.get("a").spec  # type: ignore[union-attr]
    assert spec.source == "memory://adapters/a"
    assert Path(spec.path).is_dir()
    shutil.rmtree(tmp_path / "a")
    storage.rm("/adapters/a", recursive=True)
    storage.put(str(write(tmp_path / "a", 2, tokens=7)), "/adapters/a", recursive=True)
    names.now += 31
    # The first goes on with what is known, and starts the search.
    assert names.tokens("a") == 4
    for _ in range(1000):
        if names.tokens("a") == 7:
            break
        time.sleep(0.01)
    assert names.tokens("a") == 7
    storage.rm("/adapters/a", recursive=True)
    names.now += 31
    for _ in range(1000):
        if names.tokens("a") is None:
            break
        time.sleep(0.01)
    assert names.registry.adapters() == []


def test_local_adapters_do_not_wait_for_downloads(config: Any, root: Path) -> None:
    class Slow(RemoteSource):
        def find(self, name: str) -> None:
            done.wait(30)

    names, done = Names(config, FolderSource(str(root)), Slow("memory://adapters")), threading.Event()
    write(root / "a", 1)
    assert names.tokens("a") == 4
    downloads = [names.resolver.start(f"remote{number}") for number in range(8)]
    names.now += 2
    assert names.resolver.ready("a") is None
    try:
        found = names.resolver.start("a").result(10)
    finally:
        done.set()
    assert found is not None
    assert [download.result(10) for download in downloads] == [None] * 8


def test_an_adapter_is_served_while_its_storage_cannot_be_asked(
    config: Any, tmp_path: Path, storage: Any, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    names = Names(config, RemoteSource("memory://adapters"))
    storage.put(str(write(tmp_path / "a", 1)), "/adapters/a", recursive=True)
    assert names.tokens("a") == 4

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(type(storage), "info", fail)
    names.now += 31
    assert names.tokens("a") == 4
    for _ in range(1000):
        if "It is served as it was." in log.text:
            break
        time.sleep(0.01)
    assert names.tokens("a") == 4
    with pytest.raises(AdapterNotFoundError, match=r"ConnectionError: no network"):
        names.tokens("b")


def test_a_download_that_broke_off_is_made_again(
    config: Any, tmp_path: Path, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(config, RemoteSource("memory://adapters"))
    storage.put(str(write(tmp_path / "a", 1)), "/adapters/a", recursive=True)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "open", fail)
        with pytest.raises(AdapterNotFoundError, match="ConnectionError: no network"):
            names.tokens("a")
    # Not at once, and also if nothing there has changed.
    names.now += 31
    with pytest.raises(AdapterNotFoundError, match="ConnectionError: no network"):
        names.tokens("a")
    names.now += 31
    assert names.tokens("a") == 4


def test_a_copy_that_was_evicted_is_fetched_again(config: Any, tmp_path: Path, storage: Any) -> None:
    names = Names(config, RemoteSource("memory://adapters"))
    storage.put(str(write(tmp_path / "a", 1)), "/adapters/a", recursive=True)
    names.tokens("a")
    spec = names.registry.get("a").spec  # type: ignore[union-attr]
    shutil.rmtree(spec.path)
    assert loading.reload(spec).num_virtual_tokens == 4
    config_file = json.loads(storage.cat("/adapters/a/adapter_config.json"))
    storage.pipe("/adapters/a/adapter_config.json", json.dumps({**config_file, "more": 1}).encode())
    shutil.rmtree(spec.path)
    with pytest.raises(PrefixServeError, match="are no longer those it was loaded with"):
        loading.reload(spec)
    storage.rm("/adapters/a", recursive=True)
    with pytest.raises(AdapterNotFoundError, match="No prefix adapter at 'memory://adapters/a'"):
        loading.reload(spec)
