"""Flash attention, which takes no mask over columns, and forward passes that no prefix can be put into."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache


def uses_flash(config: PreTrainedConfig) -> bool:
    """Whether a model with this config runs flash attention.

    Raises:
        ValueError: If it runs an attention that no prefix can be put into.
    """
    implementation = config.get_text_config(decoder=True)._attn_implementation
    is_flash = "flash" in implementation
    if implementation not in ("eager", "sdpa") and not is_flash:
        raise ValueError(
            f"PREFIX_EXT needs attn_implementation 'sdpa', 'eager' or flash attention, got {implementation!r}."
        )
    return is_flash


def flash_or_refuse(config: PreTrainedConfig, inputs: dict[str, Any], positions: torch.Tensor) -> bool:
    """Whether a forward pass runs flash attention.

    Raises:
        ValueError: If it would silently, or with strange words, go wrong.
    """
    if isinstance(inputs.get("cache"), PagedAttentionCache):
        raise ValueError(
            "Continuous batching reads the K/V of all requests from one paged cache, which PREFIX_EXT cannot put a prefix "
            "into; use `generate`, or serve the adapter with vLLM."
        )
    if not uses_flash(config):  # asked each time: a model can be told otherwise
        return False
    if getattr(inputs.get("past_key_values"), "is_compileable", False):
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
