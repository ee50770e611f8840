"""The names of the prefixes in a folder, of which there may be very many: each folder is looked into once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

from helpers.serving.resolving import write_lookalike
from vllm_plugin.adapters import folder_index
from vllm_plugin.adapters.sources import FolderSource

pytestmark = pytest.mark.usefixtures("settled")


def test_names_are_those_of_prefixes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lookalike(root / "b")
    write_lookalike(root / "a", "CARTRIDGE")
    write_lookalike(root / "lora", "LORA")
    write_lookalike(root / ".hidden")
    on_lora = {"base_adapters": [{"peft_type": "LORA"}], "init_text": '"peft_type": "LORA"', "peft_type": "PREFIX_EXT"}
    (write_lookalike(root / "on-lora") / "adapter_config.json").write_text(json.dumps(on_lora))
    (write_lookalike(root / "text") / "adapter_config.json").write_text('{"a": "\\"peft_type\\": \\"PREFIX_EXT\\""}')
    write_lookalike(root / "with space")
    (root / "file").write_bytes(b"")
    (root / "empty").mkdir()
    source = FolderSource(str(root))
    assert source.names() == ["a", "b", "on-lora"]
    looked: list[str] = []
    original = folder_index.type_at_a_glance
    monkeypatch.setattr(folder_index, "type_at_a_glance", lambda path: looked.append(path) or original(path))
    assert source.names() == ["a", "b", "on-lora"]
    assert looked == []
    write_lookalike(root / "c")
    (root / "b").rename(root.parent / "b")
    assert source.names() == ["a", "c", "on-lora"]
    # What is new, and folders without an adapter.
    assert sorted(looked) == [str(root / name) for name in ("c", "empty", "text")]
    (root / "empty" / "adapter_config.json").write_text('{"peft_type": "PREFIX_EXT"}')
    assert source.names() == ["a", "c", "empty", "on-lora"]
    assert FolderSource(str(root / "nowhere")).names() == []


def test_a_listing_that_fails_is_made_again(root: Path) -> None:
    source = FolderSource(str(root))
    assert source.names() == []
    write_lookalike(root / "a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No file can be opened.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert source.names() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert source.names() == ["a"]


def test_names_of_very_many_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3000):
        (root / f"a{number}").mkdir()
    monkeypatch.setattr(folder_index, "type_at_a_glance", lambda path: "PREFIX_EXT")
    source = FolderSource(str(root))
    assert len(source.names()) == 3000
    monkeypatch.setattr(folder_index, "type_at_a_glance", None)
    (root / "a0").rmdir()
    assert len(source.names()) == 2999


def test_links_whose_target_goes_and_comes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the time of the folder of links does not change."""
    target = write_lookalike(root.parent / "versions" / "a")
    (root / "a").symlink_to(target)
    (root / "later").symlink_to(root.parent / "versions" / "later")
    write_lookalike(root / "b")
    source = FolderSource(str(root), [str(root.parent / "versions")])
    assert source.names() == ["a", "b"]
    looked: list[str] = []
    original = folder_index.type_at_a_glance
    monkeypatch.setattr(folder_index, "type_at_a_glance", lambda path: looked.append(path) or original(path))
    assert source.names() is source.names()
    (root / "new").mkdir()
    assert source.names() == ["a", "b"]
    # Links that lead where they led are not looked into again.
    assert f"{root}/a" not in looked
    target.rename(root.parent / "gone")
    assert source.names() == ["b"]
    (root.parent / "gone").rename(target)
    write_lookalike(root.parent / "versions" / "later")
    assert source.names() == ["a", "b", "later"]
    shutil.rmtree(target)
    write_lookalike(target, "LORA")
    assert source.names() == ["b", "later"]


def test_very_many_links_are_looked_at_once_a_second(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_index, "_MANY", 1)
    now = [1000.0]
    monkeypatch.setattr(folder_index.time, "monotonic", lambda: now[0])
    for name in ("a", "b"):
        (root / name).symlink_to(write_lookalike(root.parent / "versions" / name))
    source = FolderSource(str(root), [str(root.parent / "versions")])
    assert source.names() == ["a", "b"]
    now[0] += 1
    assert source.names() == ["a", "b"]
    shutil.rmtree(root.parent / "versions" / "a")
    assert source.names() == ["a", "b"]
    now[0] += 1
    assert source.names() == ["b"]


def test_a_hundred_thousand_entries(root: Path) -> None:
    """Few of them adapters."""
    for number in range(100_000):
        os.mknod(root / f"f{number}")
    for number in range(10):
        write_lookalike(root / f"a{number}")
    source = FolderSource(str(root))
    began = time.process_time()
    assert source.names() == [f"a{number}" for number in range(10)]
    found = source.find("a7")
    assert found is not None
    assert found.path == str(root / "a7")
    assert source.find("f7") is None
    # An adapter with as many files beside its own.
    crowded = root.parent / "crowded"
    root.rename(crowded)
    write_lookalike(crowded / "more").joinpath("adapter_config.json").rename(crowded / "adapter_config.json")
    (crowded / "more" / "adapter_model.safetensors").rename(crowded / "adapter_model.safetensors")
    found = FolderSource(str(root.parent)).find("crowded")
    assert found is not None
    assert FolderSource(str(root.parent)).names() == ["crowded"]
    assert time.process_time() - began < 5
    shutil.rmtree(crowded)
