"""Base models by shape alone: configs like those of well-known models, to run with random weights."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

# Of Qwen2.5-0.5B, Llama-3.2-3B and Llama-3.1-8B; the vocabulary is smaller than theirs, for it is not what is measured.
SHAPES: dict[str, PreTrainedConfig] = {
    "0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
CONTEXT, VOCABULARY = 8192, 32000


def write_shape(folder: Path, name: str) -> Path:
    """Saves the config of a shape: a model folder for engines that make up the weights (`load_format="dummy"`)."""
    config = SHAPES[name]
    config.update({"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "dtype": "bfloat16"})
    config.architectures = [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[config.model_type]]
    config.save_pretrained(folder)
    return folder
