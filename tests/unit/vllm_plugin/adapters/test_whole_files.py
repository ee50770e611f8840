"""Files that someone writes while they are read: nothing that is half old and half new is served, and nothing waits for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.resolving import Names, write
from peft_prefix_ext.checkpoint.reader import read_prefix
from vllm_plugin.adapters import whole_files
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.sources import FolderSource
from vllm_plugin.errors import PrefixServeError

WEIGHTS = "adapter_model.safetensors"
STILL_NS = whole_files.STILL_NS
pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture(autouse=True)
def still(settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have to come to rest, as they do for users."""
    monkeypatch.setattr(whole_files, "STILL_NS", STILL_NS)


@contextmanager
def in_thread(work: Callable[[], None]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


@pytest.mark.parametrize("tokens", [4, 7])
def test_files_that_are_overwritten_in_place(config: Any, root: Path, tokens: int) -> None:
    """With 4 tokens, as before, the weights have their length at any moment, and half of each passes for whole."""
    names = Names(config, FolderSource(str(root)))
    old = digest_of(read_prefix(write(root / "a", 1)))
    other = write(root.parent / "other", 2, tokens=tokens)
    new = digest_of(read_prefix(other))
    assert names.tokens("a") == 4

    def overwrite() -> None:
        for name in ("adapter_config.json", WEIGHTS):
            content = (other / name).read_bytes()
            with (root / "a" / name).open("r+b", buffering=0) as file:
                for start in range(0, len(content), len(content) // 8):
                    file.write(content[start : start + len(content) // 8])
                    time.sleep(0.01)
                file.truncate()

    found: list[str | None] = []
    with in_thread(overwrite) as writer:
        while writer.is_alive():
            names.now += 1.01
            adapter = names.resolver.resolve("a")
            found.append(adapter and adapter.spec.digest)
            time.sleep(0.001)
    assert set(found) <= {old, new}
    assert names.later("a") == tokens
    assert names.registry.get("a").spec.digest == new  # type: ignore[union-attr]


def test_a_file_that_grows_without_end(config: Any, root: Path) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root / "a", 1)
    size = (root / "a" / WEIGHTS).stat().st_size
    done = threading.Event()

    def append() -> None:
        with (root / "a" / WEIGHTS).open("ab", buffering=0) as file:
            while not done.wait(0.01):
                file.write(b"more")

    with in_thread(append):
        try:
            began = time.monotonic()
            with pytest.raises(
                PrefixServeError, match=r"'a': its files in .* are being written; ask again when they are"
            ):
                names.later("a")
            assert time.monotonic() - began < 5
        finally:
            done.set()
    time.sleep(STILL_NS / 1e9)
    with pytest.raises(PrefixServeError, match="cannot be read as safetensors"):
        names.later("a")
    os.truncate(root / "a" / WEIGHTS, size)
    assert names.later("a") == 4


def test_only_files_that_were_just_written_are_waited_for(config: Any, root: Path) -> None:
    for name, age in (("old", 3600), ("new", 0), ("future", -3600)):
        folder = write(root / name, 1)
        for file in folder.iterdir():
            os.utime(file, (time.time() - age, time.time() - age))
    time.sleep(STILL_NS / 1e9)
    read: list[float] = []
    for name in ("old", "new", "future"):
        began = time.monotonic()
        whole_files.read_whole(name, str(root / name), lambda: None)
        read.append(time.monotonic() - began)
    assert max(read) < STILL_NS / 1e9
    (root / "new" / WEIGHTS).touch()
    began = time.monotonic()
    whole_files.read_whole("new", str(root / "new"), lambda: None)
    assert time.monotonic() - began > STILL_NS / 2e9
