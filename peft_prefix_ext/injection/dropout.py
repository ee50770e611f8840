"""Dropout in training: of elements of the K/V, as the code of Li & Liang (2021) does, and of whole virtual tokens.

A virtual token is dropped by hiding it in the attention mask. Zeroed, its key would still take a share of the softmax.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from peft_prefix_ext.config import PrefixExtConfig


@dataclass(frozen=True)
class PrefixDropout:
    """The dropout of one forward pass.

    Its masks come from generators of their own. A checkpointed layer that runs again gets the same mask, and the random
    state that torch restores for the layer's own dropout is untouched.

    Args:
        rate: The probability of an element to be zeroed; the others are scaled by 1 / (1 - rate).
        seed: The seed of all masks of this forward pass.
    """

    rate: float
    seed: int

    @classmethod
    @torch.compiler.disable  # generators cannot be traced
    def draw(cls, rate: float) -> PrefixDropout:
        """Returns the dropout of a new forward pass, seeded from torch's random state."""
        return cls(rate, int(torch.randint(2**62, ())))

    @torch.compiler.disable
    def __call__(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns `tensor` with elements dropped, by a mask that differs for each `name`."""
        generator = torch.Generator(tensor.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))
        kept = torch.rand(tensor.shape, generator=generator, device=tensor.device) >= self.rate
        return tensor * kept / (1 - self.rate)


@torch.compiler.disable  # a compiled graph draws other numbers
def draw_kept_tokens(config: PrefixExtConfig, device: torch.device) -> torch.Tensor:
    """Returns which virtual tokens a new forward pass keeps, `[num_virtual_tokens]`, drawn from torch's random state."""
    kept = torch.rand(config.num_virtual_tokens) >= config.token_dropout
    kept[: config.num_frozen_tokens] = True
    return kept.to(device)
