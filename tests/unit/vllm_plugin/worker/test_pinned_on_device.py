"""Pinned prefixes make room for no others, and the least recently used of them for another one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from helpers.serving import support
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.loading import load as load_adapter
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.worker.cache_layers import CacheLayer, stacks_of
from vllm_plugin.worker.prefix_manager import PrefixManager

CONFIG = support.llama_config()
# Six tokens: two layers, keys and values, two heads of 32 floats.
NBYTES = 6 * 2 * 2 * 2 * 32 * 4


class Worker:
    """A manager whose device has room for two prefixes, and which notes what it reads."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        layers = [CacheLayer(f"model.layers.{index}.self_attn.attn", index, 0, 4, 2, 32, 32) for index in (0, 1)]
        self._folder = folder
        self.manager = PrefixManager(
            stacks_of(layers),
            tp_rank=0,
            tp_size=1,
            dtype=torch.float32,
            device=torch.device(device),
            device_memory=2 * NBYTES,
        )
        self.opened: list[str] = []
        original = self.manager.open
        self.manager.open = lambda spec: (self.opened.append(spec.name), original(spec))[1]  # type: ignore[method-assign]
        self._specs: dict[str, PrefixSpec] = {}

    def spec(self, name: str, num_tokens: int = 6) -> PrefixSpec:
        if name not in self._specs:
            prefix = support.random_prefix(CONFIG, num_tokens, seed=ord(name))
            folder = str(support.write_adapter(self._folder / name, CONFIG, prefix))
            self._specs[name] = PrefixSpec(name, folder, folder, num_tokens, digest_of(load_adapter(name, folder)))
        return self._specs[name]

    def pin(self, names: str) -> None:
        self.manager.pin(frozenset(self.spec(name).digest for name in names))

    def load(self, *steps: str) -> str:
        """Loads the prefixes of each step, and returns the names of those that are on the device then."""
        for names in steps:
            assert None not in self.manager.gather([self.spec(name) for name in names])
        return "".join(
            name for name in sorted(self._specs) if self.spec(name).digest in self.manager._on_device._prefixes
        )


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_pinned_prefix_makes_no_room_for_others(worker: Worker) -> None:
    assert worker.load(*"abc") == "bc"
    worker.pin("a")
    assert worker.load(*"abcdbcd") == "ad"
    assert worker.opened.count("a") == 2
    # Without the pin it is the least recently used.
    worker.pin("")
    assert worker.load(*"c") == "cd"


def test_others_are_read_each_time_if_pinned_ones_fill_the_device(worker: Worker) -> None:
    worker.pin("ab")
    assert worker.load("ab", "c", "c", "ab") == "ab"
    assert worker.opened == ["a", "b", "c", "c"]


def test_too_many_pinned_prefixes_are_told_of_once(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.pin("abc")
    with caplog.at_level(logging.WARNING, "vllm.prefix_adapters"):
        assert worker.load(*"ab") == "ab"
        assert not caplog.messages
        # Others go first, and then those used least recently.
        assert worker.load(*"cadb") == "ab"
    (message,) = caplog.messages
    assert "The pinned prefixes do not fit on the device together (0.00 GiB)" in message


def test_a_pinned_prefix_larger_than_the_device_is_told_of(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.manager.pin(frozenset({worker.spec("a", 13).digest}))
    with caplog.at_level(logging.WARNING, "vllm.prefix_adapters"):
        assert worker.load(*"ba") == "b"
    assert len(caplog.messages) == 1


def test_another_version_takes_the_place_of_the_one_before(worker: Worker) -> None:
    worker.pin("a")
    worker.load(*"a")
    # As the scheduler says when `a` was replaced by `b`.
    worker.pin("b")
    assert worker.load(*"bcd") == "bd"


def test_two_names_of_one_content(worker: Worker) -> None:
    copy = dataclasses.replace(worker.spec("a"), name="copy")
    worker.pin("a")
    worker.manager.gather([copy])
    assert worker.load(*"bcd") == "ad"


def test_a_pinned_prefix_comes_back_from_the_host_after_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not a CPU to the manager, which then has a pool on the host as well; it has room for sixteen prefixes.
    worker = Worker(tmp_path, "meta")
    monkeypatch.setattr("vllm_plugin.worker.prefix_manager.PrefixKV.to", lambda self, device: self)
    worker.pin("a")
    worker.load(*"abcdefghijklmnopqrstuvwxyz")
    worker.manager.release_device_memory()
    assert worker.load("a") == "a"
    assert worker.opened.count("a") == 1
