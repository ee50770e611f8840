"""What a load copies to a device goes through vLLM's own copy, which does not wait; nothing else crosses to the device.

torch's "meta" device stands for the GPU: it takes tensors, and holds no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.serving import support
from peft_prefix_ext.checkpoint import LayerKV, LayerState, read_prefix, write_prefix
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.connector import PrefixConnector
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.metrics import RESIDENT
from vllm_plugin.worker.cache_layers import CacheLayer, stacks_of
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.device_copy import to_device
from vllm_plugin.worker.prefix_manager import PrefixManager
from vllm_plugin.worker.state_layers import StateLayer
from vllm_plugin.worker.state_layout import StateLayout
from vllm_plugin.worker.state_writer import StateWriter

CONFIG = support.llama_config()
BLOCK_SIZE, NUM_BLOCKS, P = 4, 12, 6
DEVICE = torch.device("meta")
LAYOUT = StateLayout(sections=(6, 6, 8), kernel_size=4, recurrent=(2, 3, 5))
SHAPES, DTYPES = ((3, 20), (2, 3, 5)), (torch.bfloat16, torch.float32)


class TensorsOfNumbers(TorchFunctionMode):
    """Fails on `torch.tensor(numbers, device=...)`, which makes its tensor on the host and copies it, below any mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        assert not (function is torch.tensor and out.device == DEVICE), "a tensor was made of numbers on the device"
        return out


class Crossings(TorchDispatchMode):
    """Counts copies from the host to the device, and fails on one that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        source = {"_to_copy": 0, "copy_": 1}.get(name)
        if source is not None and args[source].device.type == "cpu" and out.device == DEVICE:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
            assert not waits, "a copy to the device waits"
            self.count += 1
        return out


class Layer:
    """An attention layer that notes on which device its keys, values and slots are."""

    def __init__(self) -> None:
        self.impl, self.kv_cache = self, torch.empty(0, device=DEVICE)
        self.written: list[tuple[int, ...]] = []

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        assert {key.device, value.device, slots.device} == {DEVICE}
        assert key.shape[0] == value.shape[0] == slots.shape[0]
        self.written.append(tuple(key.shape))


class Worker:
    """A manager and a writer of two attention layers and a recurrent one, on the device."""

    def __init__(self, device_memory: int) -> None:
        layers = [CacheLayer(f"layers.{index}.attn", index, 0, BLOCK_SIZE, 2, 32, 32) for index in (0, 1)]
        recurrent = [StateLayer("layers.2.mixer", 2, 0, BLOCK_SIZE, SHAPES, DTYPES, "Mixer", LAYOUT)]
        caches = [
            torch.empty(NUM_BLOCKS, *shape, dtype=dtype, device=DEVICE)
            for shape, dtype in zip(SHAPES, DTYPES, strict=True)
        ]
        self.layers = {layer.name: Layer() for layer in layers}
        modules = {**self.layers, "layers.2.mixer": SimpleNamespace(kv_cache=caches)}
        self.manager = PrefixManager(
            stacks_of(layers),
            tp_rank=0,
            tp_size=1,
            dtype=torch.float32,
            device=DEVICE,
            device_memory=device_memory,
            state_layers=recurrent,
        )
        self.writer = PrefixWriter(self.manager, modules, StateWriter(recurrent, modules, DEVICE))

    def write(self, *loads: PrefixLoad) -> int:
        """Returns how many tensors went to the device."""
        with TensorsOfNumbers(), Crossings() as crossings:
            self.writer.write(loads)
        assert self.writer.take_unwritten() == set()
        return crossings.count


@pytest.fixture
def spec(tmp_path: Path) -> PrefixSpec:
    kv = {index: LayerKV(*pair) for index, pair in enumerate(support.random_prefix(CONFIG, P))}
    states = {2: LayerState(*((torch.randn(shape.shape),) for shape in LAYOUT.shapes(2)))}
    modules = {index: f"model.layers.{index}.self_attn" for index in (*kv, *states)}
    write_prefix(tmp_path / "one", kv, modules, states=states, state_modules=modules)
    path = str(tmp_path / "one")
    return PrefixSpec("one", path, path, P, digest_of(read_prefix(tmp_path / "one")))


def load(spec: PrefixSpec, *blocks: int, start: int = 0) -> PrefixLoad:
    return PrefixLoad(spec, start, P, (list(blocks),))


def test_only_slots_and_blocks_of_a_resident_prefix_go_to_the_device(spec: PrefixSpec) -> None:
    worker = Worker(1 << 20)
    # Keys, values and two states; then slots of the stack and blocks of the recurrent layer.
    assert worker.write(load(spec, 1, 2)) == 4 + 2
    assert worker.write(load(spec, 3, 4), load(spec, 3, 5, start=4)) == 2
    assert [layer.written for layer in worker.layers.values()] == [[(P, 2, 32), (P + 2, 2, 32)]] * 2


def test_a_prefix_on_the_host_is_copied_without_waiting(spec: PrefixSpec) -> None:
    worker = Worker(1)
    for _ in range(2):
        assert worker.write(load(spec, 1, 2, start=4)) == 4 + 2
    assert worker.manager.num_resident == 0
    assert [layer.written for layer in worker.layers.values()] == [[(2, 2, 32)] * 2] * 2


def test_a_copy_that_waits_is_noticed() -> None:
    for copy in (
        lambda: torch.zeros(2).to(DEVICE),
        lambda: torch.empty(2, device=DEVICE).copy_(torch.zeros(2)),
        lambda: torch.tensor([1, 2], device=DEVICE),
    ):
        with pytest.raises(AssertionError), TensorsOfNumbers(), Crossings():
            copy()


def test_what_is_on_the_device_stays_as_it_is() -> None:
    there, here = torch.empty(2, device=DEVICE), torch.zeros(2)
    assert to_device(there, DEVICE) is there
    assert to_device(here, torch.device("cpu")) is here


def test_without_memory_to_pin_a_copy_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("vllm_plugin.worker.device_copy.async_tensor_h2d", refuse)
    assert to_device(torch.zeros(2), DEVICE).device == DEVICE


def test_without_memory_on_the_device_a_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("vllm_plugin.worker.device_copy.async_tensor_h2d", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        to_device(torch.zeros(2), DEVICE)


def by_hand(writer: PrefixWriter) -> None:
    writer.release_device_memory()


def by_vllm(writer: PrefixWriter) -> None:
    """As vLLM 0.33 does around sleep."""
    connector = PrefixConnector.__new__(PrefixConnector)
    connector.writer, connector.draft_writer = writer, None
    # It may sleep after it has dropped its KV cache, and wakes up in steps.
    for _ in range(2):
        connector.unregister_kv_caches()
    for _ in range(2):
        connector.restore_kv_caches()


@pytest.mark.parametrize("release", [by_hand, by_vllm])
def test_memory_of_the_device_is_given_back_and_taken_again(
    spec: PrefixSpec, release: Callable[[PrefixWriter], None]
) -> None:
    worker = Worker(1 << 20)
    worker.write(load(spec, 1, 2))
    used = worker.manager._on_device.used
    assert used > 0
    release(worker.writer)
    assert worker.manager._on_device.used == worker.manager.num_resident == 0
    assert worker.writer.stats.data[RESIDENT] == 0
    # From the host, not from the file.
    worker.manager.open = lambda spec: 1 / 0  # type: ignore[method-assign]
    assert worker.write(load(spec, 1, 2)) == 4 + 2
    assert worker.manager._on_device.used == used
