"""Adapters of random numbers, for a model of which only the config is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.fingerprint import fingerprint
from peft_prefix_ext.writing import write_prefix


def write_random(
    folder: Path, config: Any, num_virtual_tokens: int, *, seed: int, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Saves an adapter of a decoder whose layers are alike, with numbers drawn with `seed`; returns its folder.

    Args:
        config: The model's config, of transformers.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_key_value_heads, num_virtual_tokens, head_dim)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    indices = range(config.num_hidden_layers)
    write_prefix(
        folder,
        {index: LayerKV(draw(), draw()) for index in indices},
        {index: f"model.layers.{index}.self_attn" for index in indices},
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.name_or_path or None,
        base_fingerprint=fingerprint(config),
    )
    return folder
