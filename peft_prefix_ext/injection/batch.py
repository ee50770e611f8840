"""Which prefix each row of a batch sees: all the same one, or each its own (PEFT's `adapter_names`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from peft_prefix_ext.checkpoint.format import LayerKV

# PEFT's name for no adapter at all, among `adapter_names`.
BASE = "__base__"


@dataclass(frozen=True)
class BatchAdapters:
    """The prefixes of one batch.

    A row with a prefix shorter than the longest one has columns behind it that it never sees. It counts its positions
    from its own.

    Args:
        adapters: The adapters in use, each once.
        num_virtual_tokens: p, of the longest of them.
        adapter_indices: Which of `adapters` each row sees, `[b]`, `len(adapters)` for none; `None` where all see the one.
        lengths: How many virtual tokens each row sees, `[b, 1]`; `None` as above.
        copies: How many rows in a row a batch may have for each of these, as in a beam search.
        by_row: The same as numbers, which need not be fetched from a device; empty where all see the one.
        names: What `adapter_names` says of each row.
    """

    adapters: tuple[str, ...]
    num_virtual_tokens: int
    adapter_indices: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    copies: int = 1
    by_row: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def mixed(cls, names: Sequence[str], known: Mapping[str, int], device: torch.device, copies: int) -> BatchAdapters:
        """Gives row i the prefix `names[i]`, none where that is `"__base__"`.

        Args:
            names: The names, `[b]`.
            known: How many virtual tokens each adapter has.
            device: Where the batch is.
            copies: See the class.
        """
        adapters = tuple(sorted(set(names) - {BASE}))
        adapter_indices = [len(adapters) if name == BASE else adapters.index(name) for name in names]
        lengths = [0 if name == BASE else known[name] for name in names]
        return cls(
            adapters,
            max((known[name] for name in adapters), default=0),
            torch.tensor(adapter_indices, device=device),
            torch.tensor(lengths, device=device)[:, None],
            copies,
            tuple(lengths),
            tuple(names),
        )

    @property
    def shift(self) -> int | torch.Tensor:
        """By how much real tokens stand behind position 0: one number, or `[b, 1]`."""
        return self.num_virtual_tokens if self.lengths is None else self.lengths

    def of_batch(self, size: int) -> BatchAdapters:
        """Returns the rows of a batch of `size`.

        Raises:
            ValueError: If there are not as many.
        """
        if self.adapter_indices is None or self.lengths is None or size == len(self.adapter_indices):
            return self
        if size != len(self.adapter_indices) * self.copies:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.adapter_indices)} and {size} respectively."
            )
        adapter_indices, lengths = (
            rows.repeat_interleave(self.copies, dim=0) for rows in (self.adapter_indices, self.lengths)
        )
        by_row = tuple(length for length in self.by_row for _ in range(self.copies))
        names = tuple(name for name in self.names for _ in range(self.copies))
        return replace(self, adapter_indices=adapter_indices, lengths=lengths, copies=1, by_row=by_row, names=names)

    def offsets(self, size: int) -> tuple[int, ...]:
        """Returns how many virtual tokens each row of a batch of `size` sees."""
        return self.by_row or (self.num_virtual_tokens,) * size

    def stack(self, states: list[LayerKV]) -> LayerKV:
        """Returns the K/V of `adapters` as one, `[n + 1, num_kv_heads, p, head_dim]` each, the last of zeros.

        Where all rows see the same adapter, its K/V stay as they are.
        """
        if self.adapter_indices is None:
            return states[0]
        padded = [
            [functional.pad(state, (0, 0, 0, self.num_virtual_tokens - state.shape[1])) for state in kind]
            for kind in zip(*states, strict=True)
        ]
        return LayerKV(*(torch.stack([*kind, torch.zeros_like(kind[0])]) for kind in padded))

    def pick(self, stacked: LayerKV) -> LayerKV:
        """Returns what each row sees of `stack(...)`, `[b or none, num_kv_heads, p, head_dim]` each."""
        if self.adapter_indices is None:
            return stacked
        return LayerKV(*(state[self.adapter_indices.to(state.device)] for state in stacked))
