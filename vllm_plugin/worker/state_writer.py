"""The worker's side of a prefix in recurrent layers: writes what stands for it into the blocks of a request.

Behind its prefix a recurrent layer starts from the trained state, or from zero if the prefix has none. vLLM takes the
tokens of a prefix for computed, and so reads a state that this engine never computed: without a write, whatever an earlier
request has left in the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_plugin.metadata import NULL_BLOCK, PrefixLoad
from vllm_plugin.worker.device_copy import to_device
from vllm_plugin.worker.prefix_manager import PrefixKV
from vllm_plugin.worker.state_layers import StateLayer


class StateWriter:
    """Writes states into the paged cache of one worker.

    Args:
        layers: The recurrent layers of this worker, as `PrefixManager` has them.
        modules: vLLM's modules by layer name.
        device: The device of the cache.
    """

    def __init__(self, layers: Sequence[StateLayer], modules: Mapping[str, Any], device: torch.device) -> None:
        self._device = device
        # By group and block size: the number of each layer, and its module.
        self._groups: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        for number, layer in enumerate(layers):
            self._groups.setdefault((layer.group, layer.block_size), []).append((number, modules[layer.name]))

    def write(self, ready: Sequence[tuple[PrefixLoad, PrefixKV]]) -> None:
        """Writes the states of one step's loads: per tensor, one write for each prefix that has states, and one of zeros."""
        for (group, block_size), modules in self._groups.items():
            targets: dict[str, tuple[PrefixKV, set[int]]] = {}
            for load, prefix in ready:
                key = load.spec.digest if prefix.states else ""
                targets.setdefault(key, (prefix, set()))[1].update(_blocks(load, group, block_size))
            for prefix, block_ids in targets.values():
                if not block_ids:
                    continue
                blocks = to_device(torch.tensor(sorted(block_ids)), self._device)
                for number, module in modules:
                    if not prefix.states:
                        for cache in module.kv_cache:
                            cache.index_fill_(0, blocks, 0)
                        continue
                    for cache, state in zip(module.kv_cache, prefix.states[number], strict=True):
                        cache[blocks] = to_device(state, self._device)

    def blocks(self, load: PrefixLoad) -> set[int]:
        """Returns the blocks that a load writes to."""
        return set().union(*(_blocks(load, *key) for key in self._groups))


def _blocks(load: PrefixLoad, group: int, block_size: int) -> set[int]:
    """Returns all blocks of a load in one KV cache group, from the first that holds one of its tokens.

    Not only the block of the last virtual token: model runner V1 copies a state into the block that the step writes before
    it loads.
    """
    return {*load.block_ids[group][load.start // block_size :]} - {NULL_BLOCK}
