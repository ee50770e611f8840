"""Anything in a folder of adapters, and any name: what is served is whole and lies inside; nothing outside is opened."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.serving.resolving import Names, write
from peft_prefix_ext.checkpoint.format import PrefixCheckpointError
from peft_prefix_ext.checkpoint.reader import read_prefix
from vllm_plugin.adapters import loading, whole_files
from vllm_plugin.adapters.digest_cache import DigestCache
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.sources import FolderSource
from vllm_plugin.errors import PrefixServeError

CONFIG, WEIGHTS = FILES = ("adapter_config.json", "adapter_model.safetensors")
NAMES = ("a", "b", "c")
# Where links lead to; those that begin with a dot from within the folder of adapters.
TARGETS = (*NAMES, "..", ".", "../outside", "../root/a", "nowhere", "loop", "/", "/dev", "/dev/zero", "a/" + CONFIG)
whole = st.tuples(st.just("whole"), st.integers(0, 2))
entries = st.one_of(
    whole,
    st.tuples(st.just("mixed"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("cut"), st.integers(0, 2), st.sampled_from(FILES), st.floats(0, 0.999)),
    st.tuples(st.just("link"), st.sampled_from(TARGETS)),
    st.tuples(
        st.just("odd file"),
        st.integers(0, 2),
        st.sampled_from(FILES),
        st.sampled_from(["missing", "fifo", "folder", "endless", "zero", "outside", "inside", "loop", "lora"]),
    ),
    st.tuples(st.just("file")),
)
layouts = st.fixed_dictionaries(dict.fromkeys(NAMES, entries))
ODD_NAMES = ("..", ".", "", "a/", "a/.", "./a", "../root/a", "../outside", "b/../a", "~", "a\0", "a\n", "A", "a" * 300)


def make(folder: Path, kind: str, *details: Any, sources: list[Path]) -> None:
    """Makes one entry of a folder of adapters."""
    if kind == "link":
        folder.symlink_to(details[0])
        return
    if kind == "file":
        folder.write_bytes(b"no folder")
        return
    folder.mkdir()
    for file in FILES:
        # An adapter's own weights, or in a mixed one those of another.
        source = sources[details[1] if kind == "mixed" and file == WEIGHTS else details[0]]
        content = (source / file).read_bytes()
        if kind == "cut" and details[1] == file:
            content = content[: int(len(content) * details[2])]
        (folder / file).write_bytes(content)
    if kind == "odd file":
        make_odd(folder / details[1], details[2])


def make_odd(file: Path, kind: str) -> None:
    if kind == "lora":
        (file.parent / CONFIG).write_text('{"peft_type": "LORA"}')
        return
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "endless":
        with file.open("wb") as endless:
            endless.truncate(1 << 40)
    elif kind != "missing":
        targets = {"zero": "/dev/zero", "outside": f"../../outside/{file.name}", "inside": f"../a/{file.name}"}
        file.symlink_to(targets.get(kind, file.name))


def digest_inside(root: Path, name: str) -> str | None:
    """What has to be served under a name: what is whole, if all of it lies in the folder of adapters."""
    folder = root / name
    try:
        inside = [(folder / file).resolve(strict=True).is_relative_to(root) for file in ("", *FILES)]
        return digest_of(read_prefix(folder)) if all(inside) and folder.resolve() != root else None
    except (OSError, RuntimeError, PrefixCheckpointError):
        return None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The real paths of what is opened."""
    paths: list[str] = []
    for module, name in ((os, "open"), (io, "open"), (builtins, "open")):
        original = getattr(module, name)

        def recording(file: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if not isinstance(file, int):
                paths.append(os.path.realpath(file))
            return original(file, *args, **kwargs)

        monkeypatch.setattr(module, name, recording)
    return paths


@pytest.fixture
def resolving(config: Any) -> Callable[[Path], Names]:
    """Returns what finds the adapters in a folder. As a function, which Hypothesis can print."""
    return lambda folder: Names(config, FolderSource(str(folder)))


@settings(max_examples=80)
@given(st.lists(layouts, min_size=1, max_size=2), st.text(max_size=20))
def test_any_folder(
    resolving: Callable[[Path], Names],
    tmp_path: Path,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: list[Any],
    text: str,
) -> None:
    monkeypatch.setattr(whole_files, "STILL_NS", 0)
    cache = DigestCache(tmp_path / "digests.jsonl")
    monkeypatch.setattr(loading, "digest_cache", lambda: cache)
    sources = [tmp_path / f"source{number}" for number in range(3)]
    root, outside = tmp_path / "root", tmp_path / "outside"
    if not outside.exists():
        for number, folder in enumerate((*sources, outside)):
            write(folder, number, tokens=7 if number == 1 else 4)
    names = resolving(root)
    for layout in steps:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "loop").symlink_to("loop")
        for name, entry in layout.items():
            make(root / name, *entry, sources=sources)
        expected = {name: digest_inside(root, name) for name in NAMES}
        opened.clear()
        names.now += 1.01
        served = {
            name: digest_of_name(names, name) for name in (*NAMES, *ODD_NAMES, text, str(outside), str(root / "a"))
        }
        assert {name: digest for name, digest in served.items() if digest is not None or name in NAMES} == expected
        listed = FolderSource(str(root)).names()
        assert {name for name in NAMES if expected[name]} <= set(listed) <= set(NAMES)
        assert [path for path in opened if path.startswith((str(outside), "/dev/"))] == []
        # And gone again without a request.
        shutil.rmtree(root)
        root.mkdir()
        names.resolver.remove_gone(FolderSource(str(root)).names())
        assert names.registry.adapters() == []
    for pool in (names.resolver._flights, names.resolver._looks):
        pool._pool.shutdown()


def digest_of_name(names: Names, name: str) -> str | None:
    try:
        adapter = names.resolver.start(name).result(timeout=20)
    except PrefixServeError:
        return None
    assert adapter is None or adapter.spec.name == name
    return adapter and adapter.spec.digest


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("device", ["zero", "null", "full", "stdin"])
@pytest.mark.usefixtures("settled")
def test_devices_that_may_be_read(config: Any, root: Path, file: str, device: str) -> None:
    """The operator has named their folder as well."""
    names = Names(config, FolderSource(str(root), ["/dev", "/proc"]))
    path = write(root / "a", 1) / file
    path.unlink()
    path.symlink_to(f"/dev/{device}")
    assert digest_of_name(names, "a") is None


@pytest.mark.usefixtures("settled")
def test_a_chain_of_links(config: Any, root: Path) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root / "l0", 1)
    for number in range(1, 60):
        (root / f"l{number}").symlink_to(f"l{number - 1}")
    found = [digest_of_name(names, f"l{number}") for number in range(60)]
    # The operating system follows 40.
    assert found[0] is not None
    assert set(found[:40]) == {found[0]}
    assert set(found[41:]) == {None}
    assert len(FolderSource(str(root)).names()) in (40, 41)
