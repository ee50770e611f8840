"""The models of the checks: tiny ones of several kinds, and the shapes of well-known ones, all with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.common.shapes import SERVED_SHAPES
from peft_prefix_ext import PrefixExtConfig

# Heads of 64, which every attention kernel has; weights large enough that answers depend on what is read.
_COMMON: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08},
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
_RECURRENT_AND_FULL = ["linear_attention", "full_attention"] * 2
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "mistral": {"model_type": "mistral", "sliding_window": 64},
    "gemma3": {
        **{"model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64},
        **{"sliding_window": 64, "layer_types": _SLIDING_AND_FULL},
    },
    "hybrid": {
        **{"model_type": "granitemoehybrid", "layer_types": _RECURRENT_AND_FULL, "num_local_experts": 0},
        **{"num_experts_per_tok": 0, "shared_intermediate_size": 384},
        **{"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 128},
    },
    # On a GPU vLLM keeps its states in another order than on a CPU.
    "gated delta": {
        **{"model_type": "qwen3_5_text", "layer_types": _RECURRENT_AND_FULL, "head_dim": 256},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    },
    "MLA": {
        **{"model_type": "deepseek_v2", "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512},
        "first_k_dense_replace": 4,
    },
}
MODELS = tuple(dict.fromkeys((*TINY, *SERVED_SHAPES)))


def config_of(name: str) -> PreTrainedConfig:
    """Returns the config of one of `MODELS`; a tiny one where a shape has the same name."""
    if name in TINY:
        return AutoConfig.for_model(**{**_COMMON, **TINY[name]})
    config = copy.deepcopy(SERVED_SHAPES[name])
    # Random weights as they are drawn by default say nearly the same of all tokens.
    config.initializer_range = 0.04
    return config


def write_model(folder: Path, name: str, dtype: torch.dtype, device: str, lengths: dict[str, int]) -> Path:
    """Saves a model and prefixes, which differ and change what the model says.

    Args:
        folder: An empty folder; it gets a folder for the model, and one for each prefix.
        name: One of `MODELS`.
        dtype: Of the weights.
        device: Where they are drawn.
        lengths: The virtual tokens of each prefix, by its name.

    Returns:
        The folder of the model.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()
    model.save_pretrained(folder / "base")
    for seed, (prefix, length) in enumerate(lengths.items(), start=1):
        config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, reparam="none", init="random")
        tuned = get_peft_model(model, config)
        torch.manual_seed(seed)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        tuned.save_pretrained(str(folder / prefix))
        model = tuned.unload()
    return folder / "base"
