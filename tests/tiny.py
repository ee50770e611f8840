"""Tiny random models of many architectures, in float32 and untied, so that outputs differ wherever K/V differ."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MULTI_HEAD = {"num_key_value_heads": None}
_GPT2_LIKE = {**_MULTI_HEAD, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}

_ABSENT = [("num_key_value_heads", None)]

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"sliding_window": None, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 24}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", _GPT2_LIKE),
    "gpt_neox": ("GPTNeoXConfig", _MULTI_HEAD),
    "gptj": ("GPTJConfig", {**_GPT2_LIKE, "rotary_dim": 8}),
    "opt": ("OPTConfig", {**_MULTI_HEAD, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": (
        "FalconConfig",
        {**_MULTI_HEAD, "multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "olmo2": ("Olmo2Config", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 24}),
    "granite": ("GraniteConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "stablelm": ("StableLmConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 24}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}


def tiny_config(name: str, **overrides: object) -> transformers.PreTrainedConfig:
    config_class, own = CONFIGS[name]
    values = {**_COMMON, **own, **overrides}
    return getattr(transformers, config_class)(
        **{key: value for key, value in values.items() if (key, value) not in _ABSENT}
    )


def tiny_model(name: str, seed: int = 0, attention: str = "sdpa", **overrides: object) -> PreTrainedModel:
    """Builds the model with weights large enough for attention to matter to its output."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), attn_implementation=attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Gemma multiplies embeddings by the root of its width, which would drown what attention adds.
                parameter.normal_(std=0.05 if name.startswith("gemma") and "embed" in key else 0.15)
    return model.float().eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
