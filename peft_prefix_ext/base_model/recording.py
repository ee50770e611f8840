"""`RecordingCache`: a cache that keeps what each layer writes, and the name of the module that wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from peft_prefix_ext.base_model.states import states_of
from peft_prefix_ext.checkpoint.format import LayerKV, LayerState


class RecordingCache(DynamicCache):
    """A cache that keeps the K/V that each attention layer writes, and which modules write states.

    Args:
        config: The config of the model.
        running: The names of the modules that run, the innermost last, see `running_modules`.
    """

    def __init__(self, config: Any, running: list[str]) -> None:
        super().__init__(config=config)
        self.running = running
        self.written: dict[int, tuple[str, LayerKV]] = {}
        self.mixers: dict[int, str] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer_idx = len(self.written) if layer_idx is None else layer_idx  # encoders may not number their layers
        if key_states.dim() != 4:
            raise ValueError(
                f"Layer {layer_idx} caches keys of shape {list(key_states.shape)}, which PREFIX_EXT does not support."
            )
        # A layer that shares the K/V of another one does not write; the first writer owns the cache.
        self.written.setdefault(layer_idx, (self.running[-1], LayerKV(key_states[0], value_states[0])))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.mixers.setdefault(layer_idx, self.running[-1])
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.mixers.setdefault(layer_idx, self.running[-1])
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def final_states(self) -> dict[int, tuple[str, LayerState]]:
        """Returns the module and the states of each recurrent layer after the last token, by layer index."""
        return {index: (module, states_of(self.layers[index])) for index, module in sorted(self.mixers.items())}


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list that holds, during a forward pass, the names of the modules that run, the innermost last."""
    running: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield running
