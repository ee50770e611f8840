"""The registry that all API server processes of a server share."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_prefix_ext.checkpoint.compatibility import StateShape
from vllm_plugin.adapters.pinned_names import PinnedNames
from vllm_plugin.adapters.registry import Adapter, NameTakenError, Registry
from vllm_plugin.adapters.spec import PrefixSpec

SHAPES = ((0, 2, 32, 32), (1, 2, 32, 16))


def adapter(name: str, digest: str = "0") -> Adapter:
    return Adapter(
        PrefixSpec(name=name, source=f"org/{name}", path="/x", num_virtual_tokens=4, digest=digest), None, SHAPES
    )


def pinned(name: str) -> Adapter:
    return dataclasses.replace(adapter(name), spec=dataclasses.replace(adapter(name).spec, pinned=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_two_processes_see_each_others_changes(folder: Path) -> None:
    one, other = Registry(folder), Registry(folder)
    assert one.is_new
    assert other.get("a") is None
    one.add([adapter("a"), adapter("b")])
    assert not other.is_new
    assert other.get("a") == adapter("a")
    other.add([adapter("a", "1")], replace=True)
    other.remove("b")
    assert one.get("a") == adapter("a", "1")
    assert one.get("b") is None
    assert one.adapters() == Registry(folder).adapters() == [adapter("a", "1")]


def test_engines_see_the_names_of_pinned_adapters(folder: Path) -> None:
    registry, names = Registry(folder), PinnedNames(str(folder))
    registry.add([adapter("a"), adapter("b")])
    assert names.current() is None
    registry.add([pinned("c"), pinned("d"), adapter("e")])
    assert names.current() == {"c", "d"}
    Registry(folder).remove("c")
    assert names.current() == {"d"}
    registry.add([pinned("a")], replace=True)
    assert names.current() == {"a", "d"}
    assert registry.exchange(pinned("d"), adapter("d"))
    assert names.current() == {"a"}
    registry.add([adapter("a")], replace=True)
    assert names.current() == frozenset()


def test_if_the_names_cannot_be_written_nothing_changes(folder: Path) -> None:
    registry, names = Registry(folder), PinnedNames(str(folder))
    registry.add([pinned("a")])
    (folder / "pinned.json.new").mkdir()
    for change in (lambda: registry.add([adapter("b"), pinned("c")]), lambda: registry.remove("a")):
        with pytest.raises(IsADirectoryError):
            change()
    assert registry.adapters() == Registry(folder).adapters() == [pinned("a")]
    assert names.current() == {"a"}


@pytest.mark.parametrize("content", [None, "", "[1"])
def test_names_that_cannot_be_read_are_unknown(folder: Path, content: str | None) -> None:
    file, names = folder / "pinned.json", PinnedNames(str(folder))
    Registry(folder).add([pinned("a")])
    assert names.current() == {"a"}
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    assert names.current() is None


def test_a_name_is_taken_until_it_is_removed(folder: Path) -> None:
    one, other = Registry(folder), Registry(folder)
    one.add([adapter("a")])
    with pytest.raises(NameTakenError):
        other.add([adapter("new"), adapter("a", "1")])
    assert other.get("new") is None
    assert one.get("a") == adapter("a")
    one.remove("a")
    with pytest.raises(KeyError):
        other.remove("a")
    other.add([adapter("a", "1")])
    assert one.get("a") == adapter("a", "1")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.sampled_from("01"), st.booleans())))
def test_every_reader_ends_with_the_same_table(changes: list[tuple[str, str | None, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        follow(folder, changes)


def follow(folder: str, changes: list[tuple[str, str | None, bool]]) -> None:
    registries = [Registry(folder), Registry(folder)]
    expected: dict[str, str] = {}
    for name, digest, which in changes:
        registry = registries[which]
        if digest is not None:
            registry.add([adapter(name, digest)], replace=True)
            expected[name] = digest
        elif name in expected:
            registry.remove(name)
            del expected[name]
        found = registries[not which].get(name)
        assert (found and found.spec.digest) == expected.get(name)
    for registry in (*registries, Registry(folder)):
        assert {each.spec.name: each.spec.digest for each in registry.adapters()} == expected


def test_concurrent_adds_of_one_name_succeed_once(folder: Path) -> None:
    registries = [Registry(folder) for _ in range(4)]

    def attempt(number: int) -> int:
        added = 0
        for round_number in range(30):
            try:
                registries[number].add([adapter(f"a{round_number}", str(number))])
            except NameTakenError:
                continue
            added += 1
        return added

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(4))) == 30
    assert all(registry.adapters() == registries[0].adapters() for registry in registries)


def test_an_incomplete_line_is_ignored(folder: Path) -> None:
    one, other = Registry(folder), Registry(folder)
    one.add([adapter("a")])
    with (folder / "adapters.jsonl").open("ab") as journal:
        journal.write(b'{"name": "b", "adap')
    assert other.get("a") == adapter("a")
    assert other.get("b") is None
    other.add([adapter("c")])
    assert [each.spec.name for each in one.adapters()] == ["a", "c"]


def test_names_are_not_part_of_a_path(folder: Path) -> None:
    registry = Registry(folder)
    for name in ("../../x", "a/b", "adapters.jsonl", "."):
        registry.add([adapter(name)])
        assert registry.get(name) == adapter(name)
    assert sorted(os.listdir(folder)) == ["adapters.jsonl", "length"]


def test_lookups_read_nothing_while_nothing_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(folder)
    registry.add(adapter(f"a{number}") for number in range(10_000))
    reader = Registry(folder)
    assert reader.get("a9999") == adapter("a9999")
    monkeypatch.setattr(Registry, "_read", None)
    for number in range(100):
        assert reader.get(f"a{number}") is not None
    registry._length[:] = bytes(8)
    with pytest.raises(TypeError):
        reader.get("a0")


def test_shapes_written_by_the_engine(folder: Path) -> None:
    registry = Registry(folder)
    assert registry.layers() is None
    rows = [{"index": 0, "num_kv_heads": 2, "key_size": 32, "value_size": 16}]
    (folder / "layers.json").write_text(json.dumps(rows))
    assert registry.layers() == ((0, 2, 32, 16),)


def test_states_of_adapters_and_of_the_engine(folder: Path) -> None:
    registry = Registry(folder)
    states = [(StateShape(layer, "conv", 0, (8, 3)), StateShape(layer, "recurrent", 0, (2, 4, 4))) for layer in (0, 2)]
    registry.add([dataclasses.replace(adapter("one"), states=states[0])])
    assert Registry(folder).get("one").states == states[0]
    # Two pipeline stages, in any order and more than once.
    for stage in (1, 0, 1):
        registry.add_layers(((stage + 4, 2, 32, 16),), 32, states[stage])
    assert Registry(folder).states() == (*states[0], *states[1])


def test_the_folder_is_private_and_goes_with_the_process_that_made_it() -> None:
    code = """
import os
from vllm_plugin.adapters.registry import make_folder
folder = make_folder()
fork = os.fork()
if fork:
    os.waitpid(fork, 0)
    print(folder, oct(os.stat(folder).st_mode & 0o777))
"""
    command = [sys.executable, "-c", code]
    folder, mode = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert mode == "0o700"
    assert not Path(folder).exists()
