"""The worker's side of a prefix: the copy of its K/V into the paged cache.

Names of shapes: L layers that are written alike, N virtual tokens written in one step, H KV heads on this worker, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_plugin.bank import PrefixBank
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.geometry import CacheLayer, LayerStack
from vllm_plugin.scheduler import PrefixLoad

# vLLM's block for positions that a sliding-window layer no longer needs.
NULL_BLOCK = 0


class PrefixWriter:
    """Writes prefixes into the paged cache of one worker.

    Args:
        bank: Where the prefixes come from.
        stacks: The layers with a KV cache on this worker.
        modules: vLLM's attention modules by layer name.
        device: Where the cache lies.

    Raises:
        PrefixServeError: If the cache of a layer cannot be written.
    """

    def __init__(
        self, bank: PrefixBank, stacks: Sequence[LayerStack], modules: dict[str, Any], device: torch.device
    ) -> None:
        self._bank = bank
        self._stacks = [(stack, [_checked_module(layer, modules) for layer in stack.layers]) for stack in stacks]
        self._device = device

    def write(self, loads: Sequence[PrefixLoad]) -> None:
        """Copies the prefixes of one step's loads, with one cache update per layer."""
        prefixes = [self._bank.get(load.spec) for load in loads]
        for index, (stack, modules) in enumerate(self._stacks):
            keys, values, slots = [], [], []
            for load, prefix in zip(loads, prefixes, strict=True):
                first, targets = cache_slots(load, stack.group, stack.block_size)
                keys.append(prefix.keys_LPHD[index][:, first : load.stop])
                values.append(prefix.values_LPHD[index][:, first : load.stop])
                slots.append(targets)
            slots_N = torch.from_numpy(np.concatenate(slots)).to(self._device)
            if not len(slots_N):
                continue
            for module, key_NHD, value_NHD in zip(modules, torch.cat(keys, 1), torch.cat(values, 1), strict=True):
                # The backend's own write: it alone knows the layout, packing and scales of its cache.
                module.impl.do_kv_cache_update(module, key_NHD, value_NHD, module.kv_cache, slots_N)


def cache_slots(load: PrefixLoad, group: int, block_size: int) -> tuple[int, np.ndarray[Any, Any]]:
    """Says where a load goes in one KV cache group.

    Returns:
        The first virtual token to copy, since those that have left a sliding window have no block, and the slots of it
        and all that follow up to `load.stop`, `[N]`.
    """
    blocks = np.asarray(load.block_ids[group], np.int64)[: -(-load.stop // block_size)]
    (gone,) = np.nonzero(blocks == NULL_BLOCK)
    first = max(load.start, block_size * (int(gone[-1]) + 1)) if len(gone) else load.start
    positions = np.arange(first, load.stop)
    return min(first, load.stop), blocks[positions // block_size] * block_size + positions % block_size


def _checked_module(layer: CacheLayer, modules: dict[str, Any]) -> Any:
    module = modules.get(layer.name)
    impl = getattr(module, "impl", None)
    if impl is None or not hasattr(impl, "do_kv_cache_update"):
        raise PrefixServeError(
            f"The attention backend of {layer.name} ({type(impl).__name__}) cannot be written from outside; choose "
            "another with --attention-backend."
        )
    return module
