"""Flash attention, which takes a mask of tokens instead of one of queries and keys, and inputs that have no place for a prefix.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens (of the longest prefix in the batch).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache


def refuse_paged_cache(cache: Any) -> None:
    """Raises `ValueError` for the paged cache of continuous batching."""
    if isinstance(cache, PagedAttentionCache):
        raise ValueError(
            "Continuous batching reads the K/V of all requests from one paged cache, which PREFIX_EXT cannot put a prefix "
            "into; use `generate`, or serve the adapter with vLLM."
        )


def check_flash_inputs(cache: Any, inputs: dict[str, Any], positions: torch.Tensor) -> None:
    """Checks that flash attention computes the right output for a forward pass with a prefix.

    Args:
        cache: The cache, or `None`.
        inputs: The keyword arguments of the decoder.
        positions: The positions of the new tokens, `[b or 1, q]`.

    Raises:
        ValueError: If the cache is static or the sequences are packed, which flash attention gets wrong without an error.
    """
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "Flash attention with a static cache is not supported by PREFIX_EXT: use a dynamic cache, or load the model "
            "with attn_implementation='sdpa'."
        )
    is_packed = inputs.get("cu_seq_lens_q") is not None
    if not is_packed and len(positions) == 1 and positions.shape[-1] > 1 and inputs.get("attention_mask") is None:
        is_packed = bool((positions.diff(dim=-1) != 1).any())
    if is_packed:
        raise ValueError(
            "Packed sequences under flash attention are not supported by PREFIX_EXT: load the model with "
            "attn_implementation='sdpa', which keeps packed sequences apart too."
        )


def flash_mask(mask: torch.Tensor | None, is_prefix_seen: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
    """Returns which columns of prefix and real tokens are tokens, `[b, p + k]`; `None` if all are.

    Flash attention aligns its causal mask with the last column, so every query sees the prefix before it.

    Args:
        mask: The model's mask, `[b, k]`, or `None`.
        is_prefix_seen: Which virtual tokens each row sees, `[b, p]`; `None` if there is no padding and all rows see the
            whole prefix.
        kv_length: k.
    """
    if is_prefix_seen is None:
        return None
    text = is_prefix_seen.new_ones(len(is_prefix_seen), kv_length) if mask is None else mask
    return torch.cat([is_prefix_seen.to(text.dtype), text], dim=-1)
