"""The prefixes that a worker has at hand: opened when a request first needs one.

Names of shapes: L layers that are written alike, P virtual tokens of one prefix, N of one load, H KV heads on this
worker, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugin.config import PrefixSpec
from vllm_plugin.geometry import CacheLayer, LayerStack, check_layers, shard
from vllm_plugin.store import reload


@dataclass(frozen=True, slots=True)
class PrefixKV:
    """The K/V of one prefix on one worker, in the dtype the model writes to its cache: per stack, `[L, P, H, D]`."""

    keys_LPHD: tuple[torch.Tensor, ...]
    values_LPHD: tuple[torch.Tensor, ...]


class PrefixBank:
    """Opens prefixes and keeps them on the device.

    Args:
        stacks: The layers with a KV cache on this worker.
        tp_rank: Tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
        whole_model: Whether `stacks` are all of the model's layers.
        dtype: The model's dtype.
        device: Where the cache lies.
    """

    def __init__(
        self,
        stacks: Sequence[LayerStack],
        *,
        tp_rank: int,
        tp_size: int,
        whole_model: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._stacks = stacks
        self._tp_rank, self._tp_size = tp_rank, tp_size
        self._whole_model = whole_model
        self._dtype, self._device = dtype, device
        self._prefixes: dict[str, PrefixKV] = {}

    @property
    def layers(self) -> list[CacheLayer]:
        return [layer for stack in self._stacks for layer in stack.layers]

    def get(self, spec: PrefixSpec) -> PrefixKV:
        """Returns a prefix, opened if need be.

        Raises:
            PrefixServeError: If it cannot be read, is no longer what the request was admitted with, or does not fit.
        """
        # By content: under two names, it is there once.
        if spec.digest not in self._prefixes:
            self._prefixes[spec.digest] = self._open(spec)
        return self._prefixes[spec.digest]

    def _open(self, spec: PrefixSpec) -> PrefixKV:
        checkpoint = reload(spec)
        check_layers(spec.name, checkpoint, self.layers, self._whole_model)
        keys, values = [], []
        for stack in self._stacks:
            parts = [
                shard(spec.name, checkpoint.layers[layer.index], layer, self._tp_rank, self._tp_size)
                for layer in stack.layers
            ]
            keys.append(torch.stack([part.key for part in parts]).to(self._device, self._dtype))
            values.append(torch.stack([part.value for part in parts]).to(self._device, self._dtype))
        return PrefixKV(tuple(keys), tuple(values))
