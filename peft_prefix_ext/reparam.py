"""The reparameterization: an MLP whose output is added to the initial K/V (Li & Liang 2021, section 4.3, as a residual)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.config import PrefixExtConfig


class PrefixMLP(nn.Module):
    """One trainable latent per virtual token, a trunk shared by all layers, and a head for every K and V.

    The head starts at zero: at step 0 the prefix is exactly what it was initialised to. There is no batch dimension; a
    forward pass of the model evaluates it once.

    Args:
        config: Width, depth, activation and dropout.
        shapes: The K and V shapes of each layer, `[num_kv_heads, num_tokens, head_dim]` each.
    """

    def __init__(self, config: PrefixExtConfig, shapes: list[tuple[list[int], list[int]]]) -> None:
        super().__init__()
        self.shapes = [shape for pair in shapes for shape in pair]
        self.num_tokens = self.shapes[0][1]
        self.latent = nn.Parameter(torch.randn(self.num_tokens, config.reparam_latent_size))
        trunk: list[nn.Module] = []
        width = config.reparam_latent_size
        for _ in range(config.reparam_num_layers):
            trunk += [nn.Linear(width, config.reparam_hidden_size), ACT2FN[config.reparam_activation]]
            trunk += [nn.Dropout(config.reparam_dropout)]
            width = config.reparam_hidden_size
        self.trunk = nn.Sequential(*trunk)
        self.head = nn.Linear(width, sum(heads * head_dim for heads, _, head_dim in self.shapes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def project(self) -> torch.Tensor:
        """Returns the K/V of all layers as one tensor, `[num_tokens, sum of num_kv_heads * head_dim]`."""
        return self.head(self.trunk(self.latent))

    def split(self, projected: torch.Tensor) -> list[LayerKV]:
        """Returns what `project` gave, layer by layer, `[num_kv_heads, num_tokens, head_dim]` each."""
        parts = projected.split([heads * head_dim for heads, _, head_dim in self.shapes], dim=-1)
        states = [
            part.view(self.num_tokens, heads, head_dim).transpose(0, 1)
            for part, (heads, _, head_dim) in zip(parts, self.shapes, strict=True)
        ]
        return [LayerKV(key, value) for key, value in zip(states[::2], states[1::2], strict=True)]

    def forward(self) -> list[LayerKV]:
        return self.split(self.project())
