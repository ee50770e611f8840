"""Configs of well-known models, to run with random weights: no download is needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

# The vocabulary is smaller than in the originals: it is not what the benchmarks measure.
COMMON: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 8192, "dtype": "bfloat16"}
# The shapes of Qwen2.5-0.5B, Llama-3.2-3B and Llama-3.1-8B.
SHAPES: dict[str, PreTrainedConfig] = {
    "0.5B": Qwen2Config(
        **COMMON,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "3B": LlamaConfig(
        **COMMON,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        **COMMON,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def write_shape(folder: Path, name: str) -> Path:
    """Saves the config of a shape: a model folder for engines with random weights (`load_format="dummy"`)."""
    config = copy.deepcopy(SHAPES[name])
    config.architectures = [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[config.model_type]]
    config.save_pretrained(folder)
    return folder
