"""The mask of flex attention, a function of indices and not a tensor, with columns for the prefix.

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
    of_text, device = mask.mask_mod, positions.device
    # All as tensors by row: a number that changes from one call to the next is a symbol to torch's compiler, of which the one
    # for CPUs (2.13) loses some in a mask.
    width = torch.full((batch,), num_virtual_tokens, device=device)
    ends = width if lengths is None else lengths[:, 0].to(device)
    windows = None if sliding_window is None else torch.full((batch,), sliding_window, device=device)
    position_of = None if windows is None else _position_of(positions.expand(batch, -1), ends)

    def sees(row: Index, head: Index, query: Index, column: Index) -> torch.Tensor:
        in_prefix = column < ends[row]
        if windows is not None and position_of is not None:
            in_prefix = in_prefix & (column > position_of(row, query) - windows[row])
        in_text = of_text(row, head, query, (column - width[row]).clamp(min=0))
        return torch.where(column < width[row], in_prefix, in_text)

    # Compiled, it never holds the mask as a tensor, which matters at lengths that are no CPU's.
    return create_block_mask(
        sees, batch, None, q, num_virtual_tokens + k, device=str(device), _compile=device.type != "cpu"
    )


def _position_of(positions: torch.Tensor, starts: torch.Tensor) -> Callable[[Index, Index], torch.Tensor]:
    """Returns the function that gives the position of a row's query.

    Where queries count on to the last one it needs no tensor of their number, which changes, too.

    Args:
        positions: `[b, q]`.
        starts: The position of padding on the left, `[b]`.
    """
    last = positions.shape[1] - 1
    first = positions[:, -1] - last
    counted = first[:, None] + torch.arange(last + 1, device=positions.device)
    if torch.equal(counted.maximum(starts[:, None]), positions):
        return lambda row, query: first[row] + query
    return lambda row, query: positions[row, query]
