"""From names to adapters: read with the first request, once for all who ask; found, replaced and removed with their folders."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.serving import support
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters import file_state, loading, resolver
from vllm_plugin.adapters.digest_cache import DigestCache
from vllm_plugin.adapters.loading import load_known, open_adapter, register_adapters
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter, Registry, registry_in
from vllm_plugin.adapters.resolver import Resolver
from vllm_plugin.adapters.sources import FolderSource, RemoteSource, Source
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError

CONFIG = support.llama_config()


@pytest.fixture
def config(model: Path) -> Any:
    """The config of an engine without adapters."""
    from vllm.engine.arg_utils import EngineArgs

    args = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32"}
    return EngineArgs(**args, **prefix_adapters({})).create_engine_config()


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files are old enough for their times to be trusted, and no earlier test has read them."""
    monkeypatch.setattr(file_state, "SETTLING_NS", 0)
    cache = DigestCache(tmp_path / "digests.jsonl")
    monkeypatch.setattr(loading, "digest_cache", lambda: cache)


def write(folder: Path, seed: int, *, tokens: int = 4, nan: bool = False, **overrides: Any) -> Path:
    prefix = support.random_prefix(CONFIG, tokens, seed=seed)
    if nan:
        prefix[0][0][0, 0, 0] = float("nan")
    support.write_adapter(folder, CONFIG, prefix, **overrides)
    time.sleep(0.001)
    return folder


class Names:
    """The names of one engine, seen by one process, with a clock that tests turn."""

    def __init__(
        self, config: Any, *sources: Source, prepare: Callable[[Adapter], None] = lambda adapter: None
    ) -> None:
        self.config, self.now = config, 0.0
        found = registry_in(config.kv_transfer_config)
        assert found is not None
        # Each process reads the journal by itself.
        self.registry = Registry(found.folder)
        self.resolver = Resolver(self.registry, config, sources, prepare, lambda: self.now)

    def register(self, **folders: Path) -> None:
        options = [AdapterOption(name, str(folder)) for name, folder in folders.items()]
        self.registry.add(register_adapters(options, self.config))

    def tokens(self, name: str) -> int | None:
        """Asks for a name as a request does, and returns the length of its prefix."""
        adapter = self.resolver.resolve(name)
        assert adapter is None or adapter.is_verified
        return None if adapter is None else adapter.spec.num_virtual_tokens

    def later(self, name: str) -> int | None:
        self.now += 1.01
        return self.tokens(name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders whose values were read."""
    found: list[str] = []
    original = loading.read_prefix
    monkeypatch.setattr(loading, "read_prefix", lambda folder: found.append(Path(folder).name) or original(folder))
    return found


def test_registering_reads_no_values(config: Any, tmp_path: Path, reads: list[str]) -> None:
    names, other = Names(config), Names(config)
    names.register(one=write(tmp_path / "one", 1), two=write(tmp_path / "two", 2, tokens=7))
    assert reads == []
    assert [adapter.is_verified for adapter in names.registry.adapters()] == [False, False]
    assert names.resolver.ready("one") is None
    assert names.tokens("one") == 4
    assert reads == ["one"]
    # No other process reads it again.
    for each in (names, other):
        assert each.resolver.ready("one") is not None
        assert each.tokens("one") == 4
    assert reads == ["one"]
    spec = names.registry.get("one").spec  # type: ignore[union-attr]
    assert (spec.source, spec.path) == (str(tmp_path / "one"), str(tmp_path / "one"))
    assert spec.digest == loading.digest_of(loading.read_prefix(tmp_path / "one"))


def test_the_next_start_knows_the_digests(config: Any, tmp_path: Path, reads: list[str]) -> None:
    names = Names(config)
    names.register(one=write(tmp_path / "one", 1))
    names.tokens("one")
    before = names.registry.get("one")
    names.registry.remove("one")
    names.register(one=tmp_path / "one")
    assert names.tokens("one") == 4
    assert names.registry.get("one") == before
    assert reads == ["one"]
    names.registry.remove("one")
    write(tmp_path / "one", 2)
    names.register(one=tmp_path / "one")
    assert names.tokens("one") == 4
    assert names.registry.get("one") != before
    assert reads == ["one", "one"]


def test_values_too_large_are_known_as_well(config: Any, tmp_path: Path, reads: list[str]) -> None:
    prefix = support.random_prefix(CONFIG, 4)
    prefix[1][1][0, 0, 0] = 1e5
    folder = support.write_adapter(tmp_path / "one", CONFIG, prefix)
    time.sleep(0.001)
    names = Names(config)
    names.register(one=folder)
    assert names.tokens("one") == 4
    half = copy.copy(config)
    half.model_config = copy.copy(config.model_config)
    half.model_config.dtype = torch.float16
    with pytest.raises(PrefixServeError, match="holds values too large for float16"):
        open_adapter(AdapterOption("one", str(folder)), half, None, load_known)
    assert reads == ["one"]


def test_a_bad_adapter_is_refused_once_and_tried_again_when_it_changes(
    config: Any, tmp_path: Path, reads: list[str], log: pytest.LogCaptureFixture
) -> None:
    names = Names(config)
    names.register(one=write(tmp_path / "one", 1, nan=True))
    for _ in range(3):
        for ask in (names.tokens, names.later):
            with pytest.raises(PrefixServeError, match="holds NaN or Inf"):
                ask("one")
    assert reads == ["one"]
    assert [record.getMessage() for record in log.records if "NaN" in record.getMessage()] == [
        f"Refused: Prefix adapter 'one': The key of layer 0 in {tmp_path}/one/adapter_model.safetensors holds NaN or Inf; train it "
        "again."
    ]
    write(tmp_path / "one", 1)
    with pytest.raises(PrefixServeError):
        names.tokens("one")
    assert names.later("one") == 4


def test_an_adapter_that_is_removed_while_it_is_read_stays_removed(config: Any, tmp_path: Path) -> None:
    names = Names(config, prepare=lambda adapter: names.registry.remove(adapter.spec.name))
    names.register(one=write(tmp_path / "one", 1))
    assert names.tokens("one") is None
    assert names.registry.adapters() == []


def test_what_the_engine_cannot_take_is_not_added(config: Any, tmp_path: Path) -> None:
    def prepare(adapter: Adapter) -> None:
        raise PrefixServeError("no room")

    (tmp_path / "root").mkdir()
    names = Names(config, FolderSource(str(tmp_path / "root")), prepare=prepare)
    write(tmp_path / "root" / "one", 1)
    with pytest.raises(PrefixServeError, match="no room"):
        names.tokens("one")
    assert names.registry.adapters() == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


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


@given(st.text(max_size=300))
def test_any_name(config: Any, root: Path, name: str) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root.parent / "outside", 1)
    assert names.resolver.resolve(name) is None
    assert names.registry.get(name) is None
    names.resolver._flights._pool.shutdown()


def test_names_of_clients_do_not_fill_the_memory(config: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_MAX_REFUSED", 10)
    names = Names(config, FolderSource(str(root)))
    for number in range(100):
        assert names.tokens(f"a{number}") is None
    assert len(names.resolver._refused) == 10
    assert not names.resolver._watched
    assert not names.resolver._flights._flights


def test_a_hundred_first_requests_read_once(config: Any, root: Path, reads: list[str]) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root / "a", 1)
    start = threading.Barrier(50)

    def ask(_: int) -> int | None:
        start.wait(10)
        return names.tokens("a")

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(ask, range(100))) == {4}
    assert reads == ["a"]
    assert len(names.registry.adapters()) == 1


def test_two_processes_may_read_it_at_once(config: Any, root: Path) -> None:
    write(root / "a", 1)
    source = FolderSource(str(root))
    processes = [Names(config, source) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda names: names.tokens("a"), processes)) == {4}
    assert len({names.registry.get("a") for names in processes}) == 1


def test_a_request_costs_a_look_into_a_dict_and_at_the_clock(
    config: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(config, FolderSource(str(root)))
    names.register(named=write(root / "named", 1))
    write(root / "a", 1)
    names.tokens("a")
    names.tokens("named")
    monkeypatch.setattr(Resolver, "start", None)
    for name in ("a", "named"):
        assert names.resolver.ready(name) is names.registry.get(name)
    names.now += 0.9
    assert names.tokens("a") == 4
    names.now += 100
    assert names.tokens("named") == 4
    with pytest.raises(TypeError):
        names.tokens("a")


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
