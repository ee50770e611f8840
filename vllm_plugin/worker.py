"""The worker's side of a prefix: its K/V on the device, and the copy of them into the paged cache.

Names of shapes: T virtual tokens of all adapters together, N tokens written in one step, H KV heads on this worker,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_plugin.config import PrefixSpec
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.geometry import CacheLayer, check_layers, shard
from vllm_plugin.scheduler import PrefixLoad
from vllm_plugin.store import reload

# vLLM's block for positions that a sliding-window layer no longer needs.
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class LayerBank:
    """The prefixes of all adapters in one layer: `[T, H, D]` each, in the dtype the model writes to its cache."""

    layer: CacheLayer
    module: Any
    key_THD: torch.Tensor
    value_THD: torch.Tensor


class PrefixWriter:
    """Writes prefixes into the paged cache of one worker.

    Args:
        specs: The adapters to hold on the device.
        layers: The layers with a KV cache on this worker.
        modules: vLLM's attention modules by layer name.
        tp_rank: Tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
        whole_model: Whether `layers` are all of the model's.
        dtype: The model's dtype.
        device: Where the cache lies.

    Raises:
        PrefixServeError: If an adapter does not fit the layers.
    """

    def __init__(
        self,
        specs: Sequence[PrefixSpec],
        layers: Sequence[CacheLayer],
        modules: dict[str, Any],
        *,
        tp_rank: int,
        tp_size: int,
        whole_model: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._first_row: dict[str, int] = {}
        parts: dict[str, list[Any]] = {layer.name: [] for layer in layers}
        row = 0
        for spec in specs:
            checkpoint = reload(spec)
            check_layers(spec.name, checkpoint, layers, whole_model)
            self._first_row[spec.name] = row
            row += spec.num_virtual_tokens
            for layer in layers:
                parts[layer.name].append(shard(spec.name, checkpoint.layers[layer.index], layer, tp_rank, tp_size))
        self._banks = [
            LayerBank(
                layer,
                _checked_module(layer, modules),
                *(torch.cat([pair[kind] for pair in parts[layer.name]]).to(device, dtype) for kind in (0, 1)),
            )
            for layer in layers
        ]
        self._device = device
        self._block_sizes = {layer.group: layer.block_size for layer in layers}

    def write(self, loads: Sequence[PrefixLoad]) -> None:
        """Copies the prefixes of one step's loads, with one cache update per layer."""
        targets = {
            group: tuple(torch.from_numpy(array).to(self._device) for array in self.rows_and_slots(loads, group, size))
            for group, size in self._block_sizes.items()
        }
        for bank in self._banks:
            rows_N, slots_N = targets[bank.layer.group]
            if not len(rows_N):
                continue
            key_NHD, value_NHD = bank.key_THD.index_select(0, rows_N), bank.value_THD.index_select(0, rows_N)
            # The backend's own write: it alone knows the layout, packing and scales of its cache.
            bank.module.impl.do_kv_cache_update(bank.module, key_NHD, value_NHD, bank.module.kv_cache, slots_N)

    def rows_and_slots(
        self, loads: Sequence[PrefixLoad], group: int, block_size: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Returns, for one KV cache group, the bank's rows to copy and the cache slots they go to: `[N]` each."""
        rows: list[np.ndarray[Any, Any]] = [np.empty(0, np.int64)]
        slots: list[np.ndarray[Any, Any]] = [np.empty(0, np.int64)]
        for load in loads:
            positions = np.arange(load.start, load.stop)
            blocks = np.asarray(load.block_ids[group], np.int64)[positions // block_size]
            kept = blocks != NULL_BLOCK
            rows.append(self._first_row[load.name] + positions[kept])
            slots.append((blocks * block_size + positions % block_size)[kept])
        return np.concatenate(rows), np.concatenate(slots)


def _checked_module(layer: CacheLayer, modules: dict[str, Any]) -> Any:
    module = modules.get(layer.name)
    impl = getattr(module, "impl", None)
    if impl is None or not hasattr(impl, "do_kv_cache_update"):
        raise PrefixServeError(
            f"The attention backend of {layer.name} ({type(impl).__name__}) cannot be written from outside; choose "
            "another with --attention-backend."
        )
    return module
