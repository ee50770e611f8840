"""The worker's side of a prefix: copies its K/V into the paged cache.

Shape suffixes: L layers of one stack, N virtual tokens written in one step, H KV heads on this worker, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.logger import logger
from vllm_plugin.metadata import NULL_BLOCK, PrefixLoad
from vllm_plugin.metrics import RESIDENT, PrefixStats
from vllm_plugin.worker.cache_layers import CacheLayer, LayerStack
from vllm_plugin.worker.device_copy import to_device
from vllm_plugin.worker.prefix_manager import PrefixKV, PrefixManager
from vllm_plugin.worker.state_writer import StateWriter

# The loads of a step are gathered for as many layers at a time as fit into this.
GATHERED_BYTES = 64 << 20


class PrefixWriter:
    """Writes prefixes into the paged cache of one worker.

    Args:
        manager: Provides the prefixes.
        modules: vLLM's modules by layer name.
        states: Writes the states of recurrent layers, if the model has any.

    Raises:
        PrefixServeError: If the cache of a layer cannot be written.
    """

    def __init__(self, manager: PrefixManager, modules: dict[str, Any], states: StateWriter | None = None) -> None:
        self._manager, self._device, self._states = manager, manager.device, states
        self._stacks = [
            (stack, [_checked_module(layer, modules) for layer in stack.layers]) for stack in manager.stacks
        ]
        self._unwritten: set[int] = set()
        self._num_resident = manager.num_resident
        self.stats = PrefixStats({RESIDENT: self._num_resident})

    def write(self, loads: Sequence[PrefixLoad]) -> None:
        """Copies the prefixes of one step's loads, with one cache update per layer."""
        ready: list[tuple[PrefixLoad, PrefixKV]] = []
        for load, prefix in zip(loads, self._manager.gather([load.spec for load in loads]), strict=True):
            if prefix is None:
                self._give_up(load)
            else:
                ready.append((load, prefix))
        self._report_residency()
        try:
            for index, (stack, modules) in enumerate(self._stacks):
                self._write_stack(index, stack, modules, ready)
            if self._states is not None:
                self._states.write(ready)
        except torch.OutOfMemoryError:
            logger.exception(
                "Out of memory while copying prefixes into the KV cache; the requests that wait for them fail."
            )
            for load, _ in ready:
                self._give_up(load)

    def pin(self, digests: frozenset[str]) -> None:
        """Keeps these prefixes on the device, and no others than these."""
        self._manager.pin(digests)

    def release_device_memory(self) -> None:
        """Drops the prefixes on the device. The next loads copy them from the host."""
        self._manager.release_device_memory()
        self._report_residency()

    def take_unwritten(self) -> set[int]:
        """Returns the blocks whose content is wrong because a load failed since the last call."""
        blocks, self._unwritten = self._unwritten, set()
        return blocks

    def _report_residency(self) -> None:
        if changes := self._manager.take_residency():
            self.stats.change_residency(changes)
        if self._num_resident != self._manager.num_resident:
            self._num_resident = self.stats.data[RESIDENT] = self._manager.num_resident

    def _write_stack(
        self, index: int, stack: LayerStack, modules: Sequence[Any], ready: Sequence[tuple[PrefixLoad, PrefixKV]]
    ) -> None:
        targets = [cache_slots(load, stack.group, stack.block_size) for load, _ in ready]
        slots_N = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(slots for _, slots in targets)]))
        if not len(slots_N):
            return
        slots_N = to_device(slots_N, self._device)
        sources = [
            (prefix.keys_LPHD[index], prefix.values_LPHD[index], first, load.stop)
            for (load, prefix), (first, _) in zip(ready, targets, strict=True)
        ]
        layer = stack.layers[0]
        bytes_per_layer = (
            len(slots_N) * layer.num_kv_heads * (layer.key_size + layer.value_size) * sources[0][0].itemsize
        )
        num_layers = max(1, GATHERED_BYTES // bytes_per_layer)
        for start in range(0, len(modules), num_layers):
            layers = slice(start, start + num_layers)
            keys = _joined([to_device(key[layers, first:stop], self._device) for key, _, first, stop in sources])
            values = _joined([to_device(value[layers, first:stop], self._device) for _, value, first, stop in sources])
            for module, key_NHD, value_NHD in zip(modules[layers], keys, values, strict=True):
                _update_cache(layer, module, key_NHD, value_NHD, slots_N)

    def _give_up(self, load: PrefixLoad) -> None:
        """Marks all blocks from the first one of the load: those after it are computed from it in this step."""
        for stack, _ in self._stacks:
            self._unwritten.update(load.block_ids[stack.group][load.start // stack.block_size :])
        if self._states is not None:
            self._unwritten.update(self._states.blocks(load))
        self._unwritten.discard(NULL_BLOCK)


def cache_slots(load: PrefixLoad, group: int, block_size: int) -> tuple[int, np.ndarray[Any, Any]]:
    """Returns the target of a load in one KV cache group.

    Returns:
        The first virtual token to copy, since tokens that have left a sliding window have no block, and the slots of
        the tokens from there up to `load.stop`, `[N]`.
    """
    blocks = np.asarray(load.block_ids[group], np.int64)[: -(-load.stop // block_size)]
    (outside_window,) = np.nonzero(blocks == NULL_BLOCK)
    first = max(load.start, block_size * (int(outside_window[-1]) + 1)) if len(outside_window) else load.start
    positions = np.arange(first, load.stop)
    return min(first, load.stop), blocks[positions // block_size] * block_size + positions % block_size


def _joined(parts_LNHD: list[torch.Tensor]) -> torch.Tensor:
    return parts_LNHD[0] if len(parts_LNHD) == 1 else torch.cat(parts_LNHD, dim=1)


def _update_cache(
    layer: CacheLayer, module: Any, key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor
) -> None:
    """Writes one layer by the backend's own method: only the backend knows the packing and scales of its cache."""
    if layer.layout.kv_lora_rank is None:
        module.impl.do_kv_cache_update(module, key_NHD, value_NHD, module.kv_cache, slots_N)
    else:
        # As `MLAAttention` calls it: the latent has no dimension for heads, the rotated part of the keys has one.
        module.impl.do_kv_cache_update(
            key_NHD[:, 0], value_NHD, module.kv_cache, slots_N, module.kv_cache_dtype, module._k_scale
        )


def _checked_module(layer: CacheLayer, modules: dict[str, Any]) -> Any:
    module = modules.get(layer.name)
    impl = getattr(module, "impl", None)
    if impl is None or not hasattr(impl, "do_kv_cache_update"):
        raise PrefixServeError(
            f"The attention backend of {layer.name} ({type(impl).__name__}) cannot be written from outside; choose "
            "another one with --attention-backend."
        )
    return module
