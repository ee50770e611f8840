"""The worker's side of a prefix in recurrent layers: writes the state that stands for it into the blocks of a request.

Behind its prefix a recurrent layer starts from zero. vLLM takes the tokens of a prefix for computed, and so reads a state
that nothing in this engine has computed: without a write, whatever an earlier request has left in the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.state_layers import StateLayer

# vLLM's block id for states that are not kept.
NULL_BLOCK = 0


class StateWriter:
    """Writes states into the paged cache of one worker.

    Args:
        layers: The recurrent layers of this worker.
        modules: vLLM's modules by layer name.
        device: The device of the cache.

    Raises:
        PrefixServeError: If the cache of a layer cannot be written.
    """

    def __init__(self, layers: Sequence[StateLayer], modules: dict[str, Any], device: torch.device) -> None:
        self._device = device
        self._modules: dict[tuple[int, int], list[Any]] = {}
        for layer in layers:
            self._modules.setdefault((layer.group, layer.block_size), []).append(_checked_module(layer, modules))

    def write(self, loads: Sequence[PrefixLoad]) -> None:
        """Writes the states of one step's loads, with one write per state of a layer."""
        for (group, block_size), modules in self._modules.items():
            block_ids = sorted(set().union(*(_blocks(load, group, block_size) for load in loads)))
            if not block_ids:
                continue
            blocks = torch.tensor(block_ids, device=self._device)
            for module in modules:
                for state in module.kv_cache:
                    state.index_fill_(0, blocks, 0)

    def blocks(self, load: PrefixLoad) -> Iterable[int]:
        """Returns the blocks that a load writes to."""
        return set().union(*(_blocks(load, *key) for key in self._modules))


def _blocks(load: PrefixLoad, group: int, block_size: int) -> set[int]:
    """Returns all blocks of a load in one KV cache group, from the first that holds a token of it.

    Not only the block of the last virtual token: model runner V1 copies a state into the block that the step writes before
    it loads.
    """
    return {*load.block_ids[group][load.start // block_size :]} - {NULL_BLOCK}


def _checked_module(layer: StateLayer, modules: dict[str, Any]) -> Any:
    module = modules.get(layer.name)
    if not isinstance(module, MambaBase):
        raise PrefixServeError(
            f"The states of {layer.name} ({type(module).__name__}) cannot be written from outside, so that this model "
            "cannot be served with prefix adapters."
        )
    return module
