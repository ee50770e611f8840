"""What a load writes into the cache of recurrent layers, beside its K/V."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.serving import support
from peft_prefix_ext.checkpoint import LayerKV, LayerState, read_prefix, write_prefix
from vllm_plugin.adapters.loading import digest_of
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.validation import check_states
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.prefix_manager import PrefixManager
from vllm_plugin.worker.state_layers import StateLayer, model_states
from vllm_plugin.worker.state_layout import StateLayout
from vllm_plugin.worker.state_writer import StateWriter

CONFIG = support.llama_config()
BLOCK_SIZE, NUM_BLOCKS = 4, 12
LAYOUT = StateLayout(sections=(6, 6, 8), kernel_size=4, recurrent=(2, 3, 5))
SHAPES = (3, 20), (2, 3, 5)
CPU = torch.device("cpu")


def layer(index: int, group: int, layout: StateLayout | None = LAYOUT) -> StateLayer:
    dtypes = torch.bfloat16, torch.float32
    return StateLayer(f"layers.{index}.mixer", index, group, BLOCK_SIZE, SHAPES, dtypes, "Mixer", layout)


LAYERS = [layer(2, group=0), layer(0, group=1)]


class Worker:
    """A manager and a writer over two recurrent layers in two KV cache groups, whose cache is 7 where nothing was written."""

    def __init__(self, device_memory: int = 1 << 20) -> None:
        modules = {
            each.name: SimpleNamespace(
                kv_cache=tuple(
                    torch.full((NUM_BLOCKS, *shape), 7.0, dtype=dtype)
                    for shape, dtype in zip(each.shapes, each.dtypes, strict=True)
                )
            )
            for each in LAYERS
        }
        self.caches = {each.index: modules[each.name].kv_cache for each in LAYERS}
        self.manager = PrefixManager(
            [],
            tp_rank=0,
            tp_size=1,
            dtype=torch.float32,
            device=CPU,
            device_memory=device_memory,
            state_layers=LAYERS,
        )
        self.writer = PrefixWriter(self.manager, modules, StateWriter(LAYERS, modules, CPU))

    def written(self, index: int) -> set[int]:
        """Returns the blocks of a layer that are no longer 7."""
        return {
            block for block in range(NUM_BLOCKS) if not all((cache[block] == 7).all() for cache in self.caches[index])
        }


def random_states(seed: int, *indices: int) -> dict[int, LayerState]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape.shape for shape in LAYOUT.shapes(0)]
    return {
        index: LayerState(*((torch.randn(shape, generator=generator),) for shape in shapes))
        for index in indices or (0, 2)
    }


def adapter(folder: Path, states: dict[int, LayerState], p: int = 6) -> PrefixSpec:
    kv = {index: LayerKV(*pair) for index, pair in enumerate(support.random_prefix(CONFIG, p))}
    modules = {index: f"model.layers.{index}.self_attn" for index in (*kv, *states)}
    write_prefix(folder, kv, modules, states=states, state_modules=modules)
    return PrefixSpec(folder.name, str(folder), str(folder), p, digest_of(read_prefix(folder)))


def load(spec: PrefixSpec, *block_ids: list[int], start: int = 0) -> PrefixLoad:
    return PrefixLoad(spec, start, spec.num_virtual_tokens, block_ids)


def test_states_zeros_and_nothing_else(tmp_path: Path) -> None:
    states = random_states(1)
    trained, plain = adapter(tmp_path / "trained", states), adapter(tmp_path / "plain", {})
    worker = Worker()
    worker.writer.write(
        [load(trained, [0, 3, 4], [1, 0, 2]), load(plain, [5, 6], [0, 7]), load(trained, [8, 9], [10, 11], start=4)]
    )
    for index, own, zeroed in ((2, {3, 4, 9}, {5, 6}), (0, {1, 2, 11}, {7})):
        conv, recurrent = worker.caches[index]
        assert worker.written(index) == own | zeroed
        for block in own:
            assert conv[block].T.equal(states[index].conv[0].bfloat16())
            assert recurrent[block].equal(states[index].recurrent[0])
        for block in zeroed:
            assert not conv[block].any()
            assert not recurrent[block].any()
    assert worker.writer.take_unwritten() == set()


def test_states_count_as_memory_and_stay_resident(tmp_path: Path) -> None:
    trained, plain = adapter(tmp_path / "trained", random_states(1)), adapter(tmp_path / "plain", {})
    worker = Worker(size := 2 * (3 * 20 * 2 + 2 * 3 * 5 * 4))
    worker.writer.write([load(trained, [1], [1])])
    assert worker.manager._on_device.used == size
    worker = Worker(size - 1)
    worker.writer.write([load(trained, [1], [1]), load(plain, [2], [2])])
    assert worker.manager.num_resident == 1
    assert worker.written(0) == worker.written(2) == {1, 2}


@pytest.mark.parametrize("indices", [(0,), (0, 2, 4)])
def test_a_worker_takes_the_states_of_its_layers(tmp_path: Path, indices: tuple[int, ...]) -> None:
    """Other layers may be those of another pipeline stage. A missing one fails the load, and marks its blocks."""
    worker = Worker()
    worker.writer.write([load(adapter(tmp_path / "one", random_states(1, *indices)), [1, 2, 3], [4, 0, 5], start=4)])
    failed = indices == (0,)
    assert worker.writer.take_unwritten() == ({2, 3, 5} if failed else set())
    assert worker.written(0) == (set() if failed else {5})


def test_out_of_memory_fails_the_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError

    worker = Worker()
    monkeypatch.setattr(StateWriter, "write", refuse)
    worker.writer.write([load(adapter(tmp_path / "one", random_states(1)), [1, 2], [3, 4])])
    assert worker.writer.take_unwritten() == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("states", "layers", "message"),
    [
        ((), [layer(0, 0, None)], None),
        (LAYOUT.shapes(0), LAYERS[1:], None),
        (LAYOUT.shapes(0), [], "another base model: layer 0 has no conv state in the model"),
        (LAYOUT.shapes(0), LAYERS, "another base model: layer 2 has no conv state in the adapter"),
        (
            StateLayout((6, 6, 8), 4, (2, 3, 4)).shapes(0),
            LAYERS[1:],
            r"layer 0 has a recurrent state \[2, 3, 4\], the model has \[2, 3, 5\]",
        ),
        (LAYOUT.shapes(0), [layer(0, 0, None)], "how vLLM keeps those of Mixer was never verified"),
    ],
)
def test_states_of_another_model_are_refused(states: Any, layers: list[StateLayer], message: str | None) -> None:
    if message is None:
        check_states("one", states, model_states(layers))
    else:
        with pytest.raises(PrefixServeError, match=message):
            check_states("one", states, model_states(layers))
