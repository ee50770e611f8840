"""Positions of a call that gives none: real tokens count from the prefix on, and padding does not count.

Shapes: b batch, q new tokens, k cached and new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask


def default_positions(new: torch.Tensor, cache: Any, mask: Any) -> torch.Tensor:
    """Returns the positions of the new tokens among the real ones, `[b or 1, q]`.

    Args:
        new: The new tokens or their embeddings, `[b, q, ...]`.
        cache: The cache with the tokens before them, or `None`.
        mask: What the decoder is given as `attention_mask`.
    """
    num_new = new.shape[1]
    past = int(cache.get_seq_length()) if cache is not None else 0
    text = text_columns(mask)
    # A static cache has more columns than tokens, one whose windows slid has fewer.
    if text is None or text.shape[1] < past + num_new:
        return (torch.arange(num_new, device=new.device) + past)[None]
    counted = text[:, : past + num_new].long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, past:].to(new.device)


def text_columns(mask: Any) -> torch.Tensor | None:
    """Returns which columns of an attention mask are tokens and not padding, `[b or 1, k]`; `None` where it does not say.

    An outer model may have made the decoder's masks already (Gemma 3), of four dimensions and one for each kind of layer.
    There a token is what any query sees: itself at least.
    """
    if isinstance(mask, Mapping):
        by_layer = [columns for each in mask.values() if (columns := text_columns(each)) is not None]
        return max(by_layer, key=lambda columns: columns.shape[1], default=None)
    if isinstance(mask, BlockMask):
        batch, heads, q, k = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, q, k, device=mask.kv_num_blocks.device)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    return seen_columns(mask).any(dim=1).any(dim=1)


def seen_columns(mask: torch.Tensor) -> torch.Tensor:
    """Returns what a mask of booleans, or one that is added to the scores, lets each query see."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def num_embedded_positions(decoder: nn.Module) -> int | None:
    """Returns how many positions a decoder has learned embeddings for; `None` where they are told otherwise."""
    for name in ("wpe", "embed_positions"):
        embedding = getattr(decoder, name, None)
        if isinstance(embedding, nn.Embedding):
            return int(embedding.num_embeddings - getattr(embedding, "offset", 0))
    return None


def check_room(positions: torch.Tensor, num_positions: int | None, num_virtual_tokens: int) -> None:
    """Raises `ValueError` if a position, `[b or 1, q]`, counted from the first virtual token, is past the last one there is."""
    if num_positions is None or torch.compiler.is_compiling():
        return
    if (last := int(positions.max())) >= num_positions:
        raise ValueError(
            f"The text ends at position {last}, behind {num_virtual_tokens} virtual tokens, and the model has "
            f"{num_positions} positions: shorten it."
        )
