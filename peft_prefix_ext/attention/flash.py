"""Flash attention, which takes no mask over columns, and forward passes that no prefix can be put into."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

from peft_prefix_ext.base_model.cache_argument import cache_in

# What a prefix is known to work with. Another attention function, such as one of the user's own, is tested first.
KNOWN = ("eager", "sdpa")


def attention_of(config: PreTrainedConfig) -> str:
    """Returns the name of the attention function that a model with this config runs."""
    name: str = config.get_text_config(decoder=True)._attn_implementation
    return name


def uses_flash(config: PreTrainedConfig) -> bool:
    """Whether a model with this config runs flash attention, or another that takes the same masks."""
    name = attention_of(config)
    if name in KNOWN or "flash" in name:
        return name not in KNOWN
    return ALL_MASK_ATTENTION_FUNCTIONS.get(name) is flash_attention_mask


def refuse_paged_cache(cache: Any) -> None:
    """Raises `ValueError` for the cache of continuous batching."""
    if isinstance(cache, PagedAttentionCache):
        raise ValueError(
            "Continuous batching reads the K/V of all requests from one paged cache, which PREFIX_EXT cannot put a prefix "
            "into; use `generate`, or serve the adapter with vLLM."
        )


def flash_or_refuse(config: PreTrainedConfig, inputs: dict[str, Any], positions: torch.Tensor) -> bool:
    """Whether a forward pass runs flash attention.

    Raises:
        ValueError: If it would silently, or with strange words, go wrong.
    """
    if not uses_flash(config):  # asked each time: a model can be told otherwise
        return False
    if getattr(cache_in(inputs), "is_compileable", False):
        raise ValueError("Flash attention and a static cache do not go with PREFIX_EXT: use a dynamic cache, or sdpa.")
    is_packed = inputs.get("cu_seq_lens_q") is not None
    if not is_packed and len(positions) == 1 and positions.shape[-1] > 1 and inputs.get("attention_mask") is None:
        is_packed = bool((positions.diff(dim=-1) != 1).any())
    if is_packed:
        raise ValueError(
            "Packed sequences under flash attention do not go with PREFIX_EXT: load the model with "
            "attn_implementation='sdpa', which keeps them apart as well."
        )
    return True


def flash_mask(mask: torch.Tensor | None, is_prefix_seen: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
    """Returns which columns of prefix and real tokens are tokens, `[b, p + k]`; `None` when all are.

    Flash attention is causal from the last column, so that every query sees all that stands before it.

    Args:
        mask: The model's own mask, `[b, k]`, or `None`.
        is_prefix_seen: Which virtual tokens each row sees, `[b, p]`; `None` when neither padding nor prefixes differ.
        kv_length: k.
    """
    if is_prefix_seen is None:
        return None
    text = is_prefix_seen.new_ones(len(is_prefix_seen), kv_length) if mask is None else mask
    return torch.cat([is_prefix_seen.to(text.dtype), text], dim=-1)
