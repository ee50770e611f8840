"""What is kept on disk of the values of weights files: found again by the next start, and never wrong or in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_plugin.adapters import digest_cache, file_state
from vllm_plugin.adapters.digest_cache import DigestCache, ValueFacts
from vllm_plugin.adapters.file_state import folder_state, state_of

FACTS = ValueFacts("ab" * 32, 1.5)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"1234")
    return path


def test_the_next_process_finds_what_this_one_has_computed(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "new" / "cache"
    one, state = DigestCache(path), state_of(weights)
    assert one.get(weights, state) is None
    one.put(weights, state, FACTS)
    assert one.get(weights, state) == DigestCache(path).get(weights, state) == FACTS
    assert DigestCache(path).get(tmp_path / "other", state) is None
    assert path.stat().st_mode & 0o777 == 0o600
    size = path.stat().st_size
    one.put(weights, state, FACTS)
    assert path.stat().st_size == size


def test_any_change_of_the_file_is_another_entry(tmp_path: Path, weights: Path) -> None:
    cache, states = DigestCache(tmp_path / "cache"), [state_of(weights)]
    cache.put(weights, states[0], FACTS)
    times = weights.stat()
    weights.write_bytes(b"1235")
    # Whoever sets the times back cannot set back that of the change.
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    states.append(state_of(weights))
    new = tmp_path / "new"
    new.write_bytes(b"1236")
    new.replace(weights)
    states.append(state_of(weights))
    assert len(set(states)) == 3
    assert [cache.get(weights, state) for state in states] == [FACTS, None, None]
    weights.unlink()
    assert state_of(weights) is None
    assert cache.get(weights, None) is None


@pytest.mark.parametrize(
    "damage", [b"", b"\n", b"\xff\x00\n", b'00000000 ["x", "y", 1]\n', b"12345678 [\n", b"[]\n" * 100]
)
def test_damaged_lines_are_ignored(tmp_path: Path, weights: Path, damage: bytes) -> None:
    path, state = tmp_path / "cache", state_of(weights)
    DigestCache(path).put(weights, state, FACTS)
    whole = path.read_bytes()
    path.write_bytes(damage + whole[:-5] + b"\n" + damage)
    assert DigestCache(path).get(weights, state) is None
    path.write_bytes(damage + whole + damage)
    assert DigestCache(path).get(weights, state) == FACTS


@pytest.mark.parametrize("kind", ["folder", "fifo", "below a file"])
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, weights: Path, kind: str) -> None:
    path, state = tmp_path / "cache", state_of(weights)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = weights / "cache"
    cache = DigestCache(path)
    cache.put(weights, state, FACTS)
    assert cache.get(weights, state) == FACTS
    assert DigestCache(path).get(weights, state) is None


def test_the_cache_keeps_its_latest_entries(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "MAX_BYTES", 10_000)
    cache, state = DigestCache(tmp_path / "cache"), state_of(weights)
    for number in range(200):
        cache.put(f"/{number}", state, FACTS)
    assert (tmp_path / "cache").stat().st_size < 11_000
    found = [DigestCache(tmp_path / "cache").get(f"/{number}", state) for number in range(200)]
    assert found[0] is None
    assert found[-20:] == [FACTS] * 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_model.safetensors", "cache"]


def test_a_file_that_was_changed_just_now_may_change_unnoticed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(weights)
    assert state is not None
    assert not state.is_settled
    assert folder_state(weights.parent) != folder_state(weights.parent)
    hour = 3600 * 10**9
    for times in ((-hour, -hour), (hour, -hour)):
        mtime, ctime = (time.time_ns() + each for each in times)
        assert state._replace(mtime_ns=mtime, ctime_ns=ctime).is_settled
    monkeypatch.setattr(file_state, "SETTLING_NS", 0)
    time.sleep(0.001)
    assert state.is_settled
    assert folder_state(weights.parent) == folder_state(weights.parent)
    before = folder_state(weights.parent)
    (weights.parent / "adapter_config.json").write_text("{}")
    time.sleep(0.001)
    assert folder_state(weights.parent) != before
