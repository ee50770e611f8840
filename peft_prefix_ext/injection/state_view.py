"""`PrefixStateView`: the model's cache as one recurrent layer sees it, as if the layer had read the prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

from peft_prefix_ext.checkpoint.format import LayerState


class PrefixStateView:
    """Replaces the cache in the arguments of one mixer.

    The mixer continues from the states of the view as it continues from those of a cache. They are replaced and never
    written in place by the view itself, so that gradients reach what they started from.

    Args:
        cache: The model's cache, or `None`.
        index: The layer index of the mixer.
        states: The states to start from, with a batch dimension: `[b, channels, kernel_size - 1]` and `[b, ...]` each.
            A mixer may overwrite them when it reads a single token.

    Attributes:
        call: The layer that made the view and its call of the mixer, between the hooks before and behind it.
    """

    # Convolutions of a single token ask `update_conv_state` too, instead of a kernel that has no backward pass.
    record_past = True

    def __init__(self, cache: Cache | None, index: int, states: LayerState) -> None:
        self.cache = cache
        self.call: Any = None
        # transformers caches `kernel_size` columns, the first of which no token reads any more.
        self.conv_states = {number: functional.pad(conv, (1, 0)) for number, conv in enumerate(states.conv)}
        self.recurrent_states = dict(enumerate(states.recurrent))
        self.layers = {index: self}

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def is_recording_past(self, *args: Any) -> bool:
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.conv_states.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.recurrent_states.get(state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Returns the inputs of a convolution before and at the new tokens, `[b, channels, kernel_size + q]`."""
        before = self.conv_states[state_idx].to(conv_states.dtype)
        self.conv_states[state_idx] = torch.cat([before, conv_states], dim=-1)
        return self.conv_states[state_idx]

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def __getattr__(self, name: str) -> Any:
        cache = self.__dict__.get("cache")
        if cache is None:
            raise AttributeError(
                f"There is no cache to ask for {name!r}; PREFIX_EXT does not support this recurrent layer without one."
            )
        return getattr(cache, name)
