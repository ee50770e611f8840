"""Tiny random models of many architectures, in float32 and untied, so that outputs differ wherever K/V differ."""

from __future__ import annotations

import dataclasses

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.architectures import ARCHITECTURES, MAMBA_1, REFUSED

VOCABULARY = 128
# Each config takes what it knows of it.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "rotary_dim": 8,
    # Experts.
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    # Latent attention.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # Recurrent layers.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

CONFIGS: dict[str, dict] = {name: own for models in ARCHITECTURES.values() for name, own in models.items()}
# Some of those that stock PEFT gets right, which is the reference for them.
STOCK = [
    *(
        "llama",
        "qwen2",
        "qwen3",
        "gemma3",
        "mistral",
        "mixtral",
        "qwen3_moe",
        "gemma2",
        "phi3",
        "gpt2",
        "gpt_neox",
        "gptj",
    ),
    *("opt", "falcon", "cohere2", "gpt_oss"),
]
# Hybrids whose recurrent layers cannot have a prefix.
STATELESS = list(ARCHITECTURES[MAMBA_1])


def tiny_config(name: str, **overrides: object) -> PreTrainedConfig:
    own = {**{**CONFIGS, **REFUSED}[name], **overrides}
    for about in ("base_lacks", "why"):
        own.pop(about, None)
    config_class = CONFIG_MAPPING[own.pop("model_type", name.partition(":")[0])]
    known = {field.name for field in dataclasses.fields(config_class)}
    names = {standard: name for standard, name in config_class.attribute_map.items() if name in known}
    common = {names.get(key, key): value for key, value in _COMMON.items() if names.get(key, key) in known}
    return config_class(**{**common, **{names.get(key, key): value for key, value in own.items()}})


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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens that reads any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["name: Aromi, food: Italian => Aromi serves Italian food."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
