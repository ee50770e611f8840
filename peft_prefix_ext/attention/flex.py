"""The mask of flex attention, a function of indices instead of a tensor, with columns for the prefix.

Shapes: b batch, q new tokens, k cached and new tokens, p virtual tokens (of the longest prefix in the batch).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Index = torch.Tensor


def prepend_prefix_blocks(
    mask: BlockMask,
    num_virtual_tokens: int,
    positions: torch.Tensor,
    sliding_window: int | None,
    lengths: torch.Tensor | None = None,
) -> BlockMask:
    """Returns the mask over prefix and real tokens, `[b, 1, q, p + k]`; see `prepend_prefix` for the arguments."""
    batch, _, q, k = mask.shape
    mask_of_text, device = mask.mask_mod, positions.device
    # Numbers become tensors by row. torch's compiler makes a symbol of a number that changes from call to call, and its CPU
    # backend (2.13) loses some of those inside a mask. It also fails if the variables that `mask_mod` captures come in another
    # order, which is that of their names: `mask_of_text` must be before `width`.
    width = torch.full((batch,), num_virtual_tokens, device=device)
    ends = width if lengths is None else lengths[:, 0].to(device)
    windows = None if sliding_window is None else torch.full((batch,), sliding_window, device=device)
    position_of = None if windows is None else _position_of(positions.expand(batch, -1), ends)

    def mask_mod(row: Index, head: Index, query: Index, column: Index) -> torch.Tensor:
        sees_prefix = column < ends[row]
        if windows is not None and position_of is not None:
            sees_prefix = sees_prefix & (column > position_of(row, query) - windows[row])
        sees_text = mask_of_text(row, head, query, (column - width[row]).clamp(min=0))
        return torch.where(column < width[row], sees_prefix, sees_text)

    # Compiled, it never holds the whole mask in memory, which matters for the long texts that GPUs run.
    return create_block_mask(
        mask_mod, batch, None, q, num_virtual_tokens + k, device=str(device), _compile=device.type != "cpu"
    )


def _position_of(positions: torch.Tensor, starts: torch.Tensor) -> Callable[[Index, Index], torch.Tensor]:
    """Returns a function from row and query to the query's position.

    If positions are consecutive, the function holds no tensor of size q, which changes from call to call too.

    Args:
        positions: The positions of the new tokens, `[b, q]`.
        starts: The position of left padding, `[b]`.
    """
    last = positions.shape[1] - 1
    first = positions[:, -1] - last
    consecutive = first[:, None] + torch.arange(last + 1, device=positions.device)
    if torch.equal(consecutive.maximum(starts[:, None]), positions):
        return lambda row, query: first[row] + query
    return lambda row, query: positions[row, query]
