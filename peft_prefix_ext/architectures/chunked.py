"""Masks of layers that attend within chunks of positions (Llama 4).

The prefix has the first positions of the first chunk, and moves the real tokens on: so the model's own mask, which counts
real tokens alone, has its boundaries in other places. As with a sliding window, tokens of later chunks do not see the prefix.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens.
"""

from __future__ import annotations

import torch


def chunked_mask(
    num_virtual_tokens: int,
    positions: torch.Tensor,
    padding: torch.Tensor | None,
    past: int,
    kv_length: int,
    kv_offset: int,
    chunk_size: int,
) -> torch.Tensor:
    """Returns which columns of prefix and cache the new tokens see, `[b or 1, 1, q, p + k]`.

    Args:
        num_virtual_tokens: p.
        positions: `[b or 1, q]`, of the new tokens, counted from the first virtual token.
        padding: The model's mask of two dimensions, over all real tokens there were; `None` when all are text. Without it
            and without a cache, positions that start anew are another text, packed into the same row.
        past: How many real tokens came before.
        kv_length: k.
        kv_offset: How many of them have left the cache.
        chunk_size: How many positions a chunk has.
    """
    q, device = positions.shape[-1], positions.device
    columns = torch.arange(kv_length, device=device) + kv_offset
    visible = columns <= torch.arange(q, device=device)[:, None] + past
    if padding is not None:
        text = padding.to(device).bool()
        first = (text.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
        key_positions = columns - first + num_virtual_tokens
        text = torch.nn.functional.pad(text, (0, max(0, kv_length + kv_offset - text.shape[1])))
        visible = visible & text[:, None, kv_offset : kv_offset + kv_length]
    elif past == 0 and kv_length == q:
        key_positions = positions
        text_number = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(dim=-1)
        visible = visible & (text_number[:, None] == text_number[..., None])
    else:
        key_positions = columns[None] + num_virtual_tokens
    virtual = torch.arange(num_virtual_tokens, device=device).expand(len(key_positions), -1)
    all_positions = torch.cat([virtual, key_positions], dim=-1)
    visible = torch.cat([visible.new_ones(*visible.shape[:-1], num_virtual_tokens), visible], dim=-1)
    return (visible & (all_positions[:, None] // chunk_size == positions[..., None] // chunk_size))[:, None]
