"""From names to adapters: read with the first request, once for all who ask, and refused until they change."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.serving import support
from helpers.serving.resolving import CONFIG, Names, write
from vllm_plugin.adapters import loading, refusals
from vllm_plugin.adapters.loading import load_known, open_adapter
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter
from vllm_plugin.adapters.resolver import Resolver
from vllm_plugin.adapters.sources import FolderSource
from vllm_plugin.errors import PrefixServeError

pytestmark = pytest.mark.usefixtures("settled")


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


def test_what_the_engine_cannot_serve_is_refused_without_its_values(
    config: Any, tmp_path: Path, reads: list[str]
) -> None:
    for name, more in (("base", {"base_fingerprint": {"hidden_size": 1}}), ("long", {"tokens": 255})):
        folder = write(tmp_path / name, 1, **more)
        for read in (loading.load, load_known):
            with pytest.raises(PrefixServeError, match=r"another base model|leaves no room"):
                open_adapter(AdapterOption(name, str(folder)), config, None, read)
    assert reads == []


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


@given(st.text(max_size=300))
def test_any_name(config: Any, root: Path, name: str) -> None:
    names = Names(config, FolderSource(str(root)))
    write(root.parent / "outside", 1)
    assert names.resolver.resolve(name) is None
    assert names.registry.get(name) is None
    names.resolver._flights._pool.shutdown()


def test_names_of_clients_do_not_fill_the_memory(config: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_MAX_REFUSED", 10)
    names = Names(config, FolderSource(str(root)))
    for number in range(100):
        assert names.tokens(f"a{number}") is None
    assert len(names.resolver._refusals) == 10
    for name in ("a" * 10_000, "not a name", ".."):
        assert names.tokens(name) is None
        assert name not in names.resolver._refusals
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
