"""`PrefixCacheView`: the model's cache as one attention layer sees it, with the prefix before the real tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from peft_prefix_ext.checkpoint.format import LayerKV


class PrefixCacheView:
    """Replaces the cache in the arguments of one attention module.

    Only real tokens are written to the cache, which never holds the prefix. Its length, its masks and whatever `generate`
    does with it (static shapes, beams, cropping) stay those of the base model. Without a cache, as under gradient
    checkpointing, the view puts the prefix before the new tokens.

    Args:
        cache: The model's cache, or `None`.
        prefix: The K/V of the prefix, `[b or none, num_kv_heads, p, head_dim]` each.
        order: The order of the columns of prefix and real tokens, `[b, p + k]`; `None` for the prefix first.
    """

    def __init__(self, cache: Cache | None, prefix: LayerKV, order: torch.Tensor | None = None) -> None:
        self.cache = cache
        self.prefix = prefix
        self.order = order

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new K/V, `[b, num_kv_heads, q, head_dim]`, and returns those of prefix, cached and new tokens."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, *args, **kwargs)
        keys, values = prepend(self.prefix.key, key_states), prepend(self.prefix.value, value_states)
        if self.order is None:
            return keys, values
        return _reorder(keys, self.order), _reorder(values, self.order)

    def get_seq_length(self, *args: Any) -> int:
        """Returns how many tokens precede the new ones, the prefix included: Llama 4's attention derives positions from it."""
        cached = 0 if self.cache is None else self.cache.get_seq_length(*args)
        return self.prefix.key.shape[-2] + cached

    def __getattr__(self, name: str) -> Any:
        if self.cache is None:
            raise AttributeError(
                f"There is no cache to ask for {name!r}; PREFIX_EXT does not support this model without one."
            )
        return getattr(self.cache, name)


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Returns the K or V of prefix and tokens, `[b, num_kv_heads, p + k, head_dim]`, in the dtype and on the device of `states`."""
    expanded = prefix.to(device=states.device, dtype=states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([expanded, states], dim=-2)


def _reorder(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return states.gather(2, order.to(states.device)[:, None, :, None].expand_as(states))
