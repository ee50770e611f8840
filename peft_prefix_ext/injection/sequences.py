"""Which rows a recurrent layer runs, so that each starts at the first token of a sequence.

A recurrent layer reads padding, too: its states decay there. So what it starts from must not stand before padding on the
left, nor does it see where packed sequences begin. Here the tokens of a batch are laid out anew: with their padding
behind them, or each packed sequence in a row of its own.

Shapes: b batch, q new tokens, n rows, l tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_prefix_ext.base_model.cache_argument import find_cache

# Arguments that say where packed sequences begin, in models with kernels that read them.
PACKING_ARGUMENTS = (
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


@dataclass(frozen=True)
class SequenceRows:
    """Rows of tokens that a recurrent layer runs at once.

    Args:
        index: Where each token stands in the batch, counted row by row, `[n, l]`; b * q for none.
        rows: The row of the batch that each of the rows is of, `[n]`.
        is_empty: Whether there are none but padding tokens, which change no state.
    """

    index: torch.Tensor
    rows: torch.Tensor
    is_empty: bool = False

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """Returns these rows, `[n, l, ...]`, of a batch, `[b, q, ...]`. What stands for no token may be any."""
        flat = batch.flatten(0, 1)
        return flat[self.index.to(flat.device).clamp(max=len(flat) - 1)]


def put_back(outputs: list[torch.Tensor], layout: list[SequenceRows], batch_size: int, num_new: int) -> torch.Tensor:
    """Returns the outputs of all rows, `[n, l, ...]` each, where their tokens stand in the batch, `[b, q, ...]`."""
    features = outputs[0].shape[2:]
    flat = outputs[0].new_zeros(batch_size * num_new + 1, *features)  # the last one for what is no token
    index = torch.cat([rows.index.flatten() for rows in layout]).to(flat.device)
    values = torch.cat([output.flatten(0, 1) for output in outputs])
    return flat.index_put((index,), values)[:-1].unflatten(0, (batch_size, num_new))


def count_padding_before(mask: torch.Tensor) -> torch.Tensor:
    """Returns how many columns of a padding mask, `[b, q]`, are padding on the left of each row, `[b]`."""
    return (mask.long().cumsum(dim=-1) == 0).sum(dim=-1)


def has_padding_before(mask: torch.Tensor) -> bool:
    """Whether a row of a padding mask, `[b, q]`, begins with padding."""
    return not bool(mask[:, 0].all())


def rolled_rows(mask: torch.Tensor) -> list[SequenceRows]:
    """Returns all rows at once, with the padding on their left moved behind them; their last states are of no use."""
    batch_size, num_new = mask.shape
    columns = torch.arange(num_new, device=mask.device)[None] + count_padding_before(mask)[:, None]
    rows = torch.arange(batch_size, device=mask.device)
    return [SequenceRows(rows[:, None] * num_new + columns % num_new, rows)]


def grouped_rows(mask: torch.Tensor) -> list[SequenceRows]:
    """Returns rows with as much padding on the left together, without it; their last states are those of the text."""
    num_new = mask.shape[1]
    padding = count_padding_before(mask).tolist()
    groups = []
    for number in sorted(set(padding)):
        rows = torch.tensor([row for row, each in enumerate(padding) if each == number], device=mask.device)
        start = number if number < num_new else 0
        columns = torch.arange(start, num_new, device=mask.device)
        groups.append(SequenceRows(rows[:, None] * num_new + columns, rows, is_empty=number == num_new))
    return groups


def packed_rows(sequences: torch.Tensor) -> list[SequenceRows]:
    """Returns each packed sequence as a row of its own; their last states are of no use.

    Args:
        sequences: A number for each sequence, at all of its tokens, `[b, q]`.
    """
    batch_size, num_new = sequences.shape
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([batch_size * num_new])])
    lengths = ends - starts
    columns = torch.arange(int(lengths.max()), device=sequences.device)[None]
    index = torch.where(columns < lengths[:, None], starts[:, None] + columns, batch_size * num_new)
    return [SequenceRows(index, starts // num_new)]


def find_packed_sequences(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns which packed sequence each token is of, `[b or 1, q]`; `None` if each row is one sequence.

    As in transformers' masks, sequences are packed where the caller gives neither mask nor cache, and positions do not go
    up by one.

    Args:
        inputs: The arguments of the decoder.
    """
    if torch.compiler.is_compiling() or inputs.get("attention_mask") is not None or find_cache(inputs) is not None:
        return None
    positions = inputs.get("position_ids")
    if (sequences := inputs.get("seq_idx")) is None and positions is not None:
        if positions.dim() > 2 and len(positions) != 4:
            return None  # those of images, which stand still within an image
        positions = positions[0] if positions.dim() > 2 else positions
        sequences = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(dim=-1)
    if sequences is None or bool((sequences == sequences[:, :1]).all()):
        return None
    return sequences
