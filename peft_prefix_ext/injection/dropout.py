"""Prefix dropout: zeroes elements of the K/V in training, as Li & Liang's code does."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefixDropout:
    """The dropout of one forward pass.

    Its masks come from generators of its own: a checkpointed layer that runs again sees the same mask, and the random
    state that it was given back for its own dropout is where it was.

    Args:
        rate: The probability of an element to be zeroed; the others are scaled by 1 / (1 - rate).
        seed: What the masks of this forward pass follow from.
    """

    rate: float
    seed: int

    @classmethod
    @torch.compiler.disable  # a graph knows no generators
    def draw(cls, rate: float) -> PrefixDropout:
        """Returns the dropout of another forward pass, by torch's random state."""
        return cls(rate, int(torch.randint(2**62, ())))

    @torch.compiler.disable
    def __call__(self, state: torch.Tensor, name: str) -> torch.Tensor:
        """Returns `state` with elements dropped, in a way of its own for each `name`."""
        generator = torch.Generator(state.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))
        kept = torch.rand(state.shape, generator=generator, device=state.device) >= self.rate
        return state * kept / (1 - self.rate)
