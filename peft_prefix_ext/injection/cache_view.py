"""A view of the model's cache, for one attention layer, in which the prefix stands before the real tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from peft_prefix_ext.checkpoint.format import LayerKV


class PrefixCacheView:
    """Takes the cache's place inside one attention module's forward.

    Only real tokens are written into the real cache, which therefore never knows of the prefix: its length, its masks and
    whatever `generate` does with it (static shapes, beams, cropping) stay the base model's own. Without a cache, as under
    gradient checkpointing, it stands before the current tokens alone.

    Args:
        cache: The model's cache.
        prefix: The K/V of the prefix.
        order: In which order the columns stand, `[batch, p + k]`; the prefix' own come first when not given.
    """

    def __init__(self, cache: Cache | None, prefix: LayerKV, order: torch.Tensor | None = None) -> None:
        self.cache = cache
        self.prefix = prefix
        self.order = order

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Caches the new states, `[batch, num_kv_heads, num_new, head_dim]`, and returns prefix + cached + new."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, *args, **kwargs)
        keys, values = prepend(self.prefix.key, key_states), prepend(self.prefix.value, value_states)
        if self.order is None:
            return keys, values
        return _reorder(keys, self.order), _reorder(values, self.order)

    def get_seq_length(self, *args: Any) -> int:
        """How many tokens stand before the new ones, the prefix included: Llama 4's attention counts positions by it."""
        cached = 0 if self.cache is None else self.cache.get_seq_length(*args)
        return self.prefix.key.shape[-2] + cached

    def __getattr__(self, name: str) -> Any:
        if self.cache is None:
            raise AttributeError(
                f"There is no cache to ask for {name!r}; PREFIX_EXT does not support this model without one."
            )
        return getattr(self.cache, name)


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Returns prefix + states, `[batch, num_kv_heads, p + k, head_dim]`, in the dtype and on the device of the states."""
    expanded = prefix.to(device=states.device, dtype=states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([expanded, states], dim=-2)


def _reorder(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return states.gather(2, order.to(states.device)[:, None, :, None].expand_as(states))
