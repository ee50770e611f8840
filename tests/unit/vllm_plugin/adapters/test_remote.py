"""Adapters in remote storage: copied once per state, within a cache of bounded size."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peft_prefix_ext.checkpoint.format import PrefixCheckpointError, PrefixNotFoundError
from vllm_plugin.adapters.adapter_kinds import adapter_type
from vllm_plugin.adapters.remote import RemoteCache, is_remote, remote_state
from vllm_plugin.adapters.sources import RemoteSource

URL = "memory://bucket/adapters"


def put(storage: Any, name: str, weights: bytes = b"weights", kind: str = "PREFIX_EXT") -> str:
    storage.pipe(f"/bucket/adapters/{name}/adapter_config.json", json.dumps({"peft_type": kind}).encode())
    storage.pipe(f"/bucket/adapters/{name}/adapter_model.safetensors", weights)
    return f"{URL}/{name}"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_copy_per_state(storage: Any, tmp_path: Path) -> None:
    cache, url = RemoteCache(tmp_path), put(storage, "a")
    first = cache.fetch(url)
    assert contents(first) == {
        "adapter_config.json": b'{"peft_type": "PREFIX_EXT"}',
        "adapter_model.safetensors": b"weights",
    }
    assert cache.fetch(url) == cache.fetch(f"{url}/") == first
    put(storage, "a", b"changed")
    second = cache.fetch(url)
    assert second != first
    assert contents(second)["adapter_model.safetensors"] == b"changed"
    # Whoever reads the old one goes on.
    assert contents(first)["adapter_model.safetensors"] == b"weights"


def test_the_least_recently_used_copies_go(storage: Any, tmp_path: Path) -> None:
    cache = RemoteCache(tmp_path, 3000)
    urls = [put(storage, name, bytes(900)) for name in "abcd"]
    copies = []
    for url in urls[:3]:
        copies.append(cache.fetch(url))
        time.sleep(0.01)
    cache.fetch(urls[0])
    copies.append(cache.fetch(urls[3]))
    assert [copy.is_dir() for copy in copies] == [True, False, True, True]
    assert cache.fetch(urls[1]) == copies[1]
    assert copies[1].is_dir()
    with pytest.raises(PrefixCheckpointError, match="has 3027 bytes, more than --prefix-adapter-cache-size allows"):
        cache.fetch(put(storage, "e", bytes(3000)))
    assert not list(tmp_path.glob(".new-*"))


def test_a_copy_is_of_one_piece(storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, replacements = put(storage, "a", b"old"), [b"new", b"newer"]
    original = type(storage).open

    def replace_before_the_weights(self: Any, path: str, *args: Any, **more: Any) -> Any:
        if path.endswith("safetensors") and args == ("rb",) and replacements:
            self.pipe_file(path, replacements.pop(0))
            self.pipe_file(f"{path.rpartition('/')[0]}/adapter_config.json", b"{}")
        return original(self, path, *args, **more)

    monkeypatch.setattr(type(storage), "open", replace_before_the_weights)
    copy = RemoteCache(tmp_path).fetch(url)
    assert contents(copy) == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"newer"}
    assert [path for path in tmp_path.glob("*/*") if path.is_dir()] == [copy]
    replacements += [b"1", b"2", b"3"]
    put(storage, "a", b"old")
    with pytest.raises(PrefixNotFoundError, match="replaced again and again"):
        RemoteCache(tmp_path).fetch(url)


def test_changes_behind_http_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).write_bytes(b"1")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a"
        first = remote_state(url)
        assert first == remote_state(url)
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
        assert first != remote_state(url) is not None
        assert remote_state(f"{url}/nothing") is None
        server.shutdown()


def test_an_object_without_end_is_not_copied(storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(storage, "a", bytes(5000))
    monkeypatch.setattr(type(storage), "info", lambda self, path, **_: {"name": path, "size": 1, "type": "file"})
    with pytest.raises(PrefixNotFoundError, match="more than 3000 bytes"):
        RemoteCache(tmp_path, 3000).fetch(url)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [(f"{URL}/nothing", "FileNotFoundError: no adapter_config.json"), ("nope://x/y", "Protocol not known: nope")],
)
def test_what_is_not_there_is_said_in_one_sentence(storage: Any, tmp_path: Path, url: str, reason: str) -> None:
    assert is_remote(url)
    with pytest.raises(PrefixNotFoundError, match=r"\A[^\n]*\Z") as caught:
        RemoteCache(tmp_path).fetch(url)
    assert f"No prefix adapter at {url!r} (" in str(caught.value)
    assert reason in str(caught.value)


def test_a_folder_of_remote_storage(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(storage, "b")
    url = put(storage, "a")
    put(storage, "sub/deeper")
    source = RemoteSource(f"{URL}/")
    found = source.find("a")
    assert found == (url, url, remote_state(url))
    assert source.find("a") == found
    put(storage, "a", b"changed")
    changed = source.find("a")
    assert changed is not None
    assert changed.state != found.state
    storage.rm("/bucket/adapters/a/adapter_config.json")
    for name in ("a", "nothing", "sub", "..", "../adapters/b", "b/", "sub/deeper", ""):
        assert source.find(name) is None
    assert source.names() == ["a", "b", "sub"]
    put(storage, "c")
    # A listing takes long, so it is kept for a while.
    assert source.names() == ["a", "b", "sub"]
    monkeypatch.setattr(source, "refresh_seconds", 0)
    assert source.names() == ["a", "b", "c", "sub"]
    assert (adapter_type(f"{URL}/b"), adapter_type(f"{URL}/nothing")) == ("PREFIX_EXT", None)
