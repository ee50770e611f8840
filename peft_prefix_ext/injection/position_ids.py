"""Positions of a call without `position_ids`: they count real tokens, and not padding.

Shapes: b batch, q new tokens, k cached and new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask


def default_positions(tokens: torch.Tensor, cache: Any, mask: Any) -> torch.Tensor:
    """Returns the positions of the new tokens among the real tokens, `[b or 1, q]`, without the virtual tokens.

    Args:
        tokens: The new tokens or their embeddings, `[b, q, ...]`.
        cache: The cache with the tokens before them, or `None`.
        mask: The `attention_mask` of the decoder.
    """
    num_new = tokens.shape[1]
    past = num_cached_tokens(cache)
    text = text_columns(mask)
    # A static cache has more columns than tokens; a cache whose windows slid has fewer.
    if text is None or text.shape[1] < past + num_new:
        return (torch.arange(num_new, device=tokens.device) + past)[None]
    counted = text[:, : past + num_new].long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, past:].to(tokens.device)


def text_positions(
    positions: torch.Tensor, tokens: torch.Tensor, cache: Any, mask: Any, shift: int | torch.Tensor
) -> torch.Tensor:
    """Returns the positions of the new tokens in the text, `[b or 1, q]`, which masks and windows go by.

    Multimodal rotary embeddings have axes (time, height and width) on which an image takes fewer positions than it has
    tokens. The positions in the text may come before these axes; if they do not, the tokens are counted.

    A new tensor in any case: the context that holds it is an attribute of `positions`, and would keep them alive.

    Args:
        positions: The positions of the new tokens, `[b or 1, q]`, or of three or four axes, `[3 or 4, b, q]`.
        tokens: As in `default_positions`.
        cache: As in `default_positions`.
        mask: As in `default_positions`.
        shift: The position of the first real token: one number, or `[b, 1]`.
    """
    if positions.dim() == 2:
        return positions.view_as(positions)
    if len(positions) == 4:
        return positions[0]
    return default_positions(tokens, cache, mask) + shift


def num_cached_tokens(cache: Any) -> int:
    """Returns how many tokens a cache, or `None`, holds; where all layers are recurrent, which keep no count, 1 for any."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())


def text_columns(mask: Any) -> torch.Tensor | None:
    """Returns which columns of an attention mask are not padding, `[b or 1, k]`; `None` if the mask does not tell.

    The caller may pass masks of four dimensions, one for each layer type (Gemma 3). In them, a token is any column that
    some query sees: each token sees at least itself.
    """
    if isinstance(mask, Mapping):
        by_layer_type = [columns for each in mask.values() if (columns := text_columns(each)) is not None]
        return max(by_layer_type, key=lambda columns: columns.shape[1], default=None)
    if isinstance(mask, BlockMask):
        batch, heads, q, k = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, q, k, device=mask.kv_num_blocks.device)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    return seen_columns(mask).any(dim=1).any(dim=1)


def seen_columns(mask: torch.Tensor) -> torch.Tensor:
    """Returns a boolean or additive mask as booleans, True where a query sees a column."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def num_embedded_positions(decoder: nn.Module) -> int | None:
    """Returns how many positions a decoder has learned embeddings for; `None` if it has none."""
    for name in ("wpe", "embed_positions"):
        embedding = getattr(decoder, name, None)
        if isinstance(embedding, nn.Embedding):
            return int(embedding.num_embeddings - getattr(embedding, "offset", 0))
    return None


def check_num_positions(positions: torch.Tensor, num_positions: int | None, num_virtual_tokens: int) -> None:
    """Checks that the model has an embedding for every position.

    Args:
        positions: The positions of the new tokens, `[b or 1, q]`, counted from the first virtual token.
        num_positions: How many positions the model has embeddings for, or `None`.
        num_virtual_tokens: p.

    Raises:
        ValueError: If a position has no embedding.
    """
    if num_positions is None or torch.compiler.is_compiling():
        return
    if (last := int(positions.max())) >= num_positions:
        raise ValueError(
            f"The text ends at position {last}, behind {num_virtual_tokens} virtual tokens, and the model has "
            f"{num_positions} positions: shorten it."
        )
