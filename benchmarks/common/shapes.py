"""Configs of well-known models, to run with random weights: no download is needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import DeepseekV2Config, GraniteMoeHybridConfig, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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

# Those that are served only. The hybrid has one attention layer in ten, and Mamba-2 layers; sizes are those of
# Granite-4.0-H-1B. The latents are those of DeepSeek-V2-Lite, whose experts are left out.
SERVED_SHAPES: dict[str, PreTrainedConfig] = {
    **SHAPES,
    "hybrid": GraniteMoeHybridConfig(
        **COMMON,
        hidden_size=1536,
        intermediate_size=4096,
        shared_intermediate_size=4096,
        num_hidden_layers=40,
        layer_types=["full_attention" if index % 10 == 5 else "linear_attention" for index in range(40)],
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        tie_word_embeddings=True,
    ),
    "MLA": DeepseekV2Config(
        **COMMON,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        first_k_dense_replace=27,
    ),
}


def write_shape(folder: Path, name: str, **changes: Any) -> Path:
    """Saves the config of a shape: a model folder for engines with random weights (`load_format="dummy"`).

    Args:
        folder: The folder.
        name: One of `SERVED_SHAPES`.
        changes: Fields of the config that differ.
    """
    config = copy.deepcopy(SERVED_SHAPES[name])
    config.update(changes)
    name_architecture(config)
    config.save_pretrained(folder)
    return folder


def name_architecture(config: PreTrainedConfig) -> None:
    """Writes into a config the class that runs it, which engines ask for."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
