"""The models that the tests sweep over, by how their layers mix tokens.

Run as a script, this rewrites the table in the documentation.
"""

from __future__ import annotations

import sys
from pathlib import Path

WINDOW = 24
HYBRIDS = "Hybrids; their recurrent layers have a prefix, too"
MAMBA_1 = "Hybrids with Mamba-1; only their attention layers have the prefix"
RECURRENT = "Recurrent layers alone"

_SLIDING = {"sliding_window": WINDOW}
_SLIDING_AND_FULL = {**_SLIDING, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_RECURRENT_AND_FULL = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}

# By kind, from the name of a model to what its tiny config has of its own. The name is the model type, but for what stands
# after a colon; where it is another one, `model_type` says so; `base_lacks` names the modes that the base model itself gets wrong.
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "Full attention": {
        "llama": {},
        "apertus": {},
        "arcee": {},
        "biogpt": {},
        "bitnet": {},
        "codegen": {},
        "cohere": {},
        "ctrl": {"dff": 96},
        "diffllama": {},
        "doge": {},
        "ernie4_5": {},
        "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "falcon:multi-query": {"multi_query": True},
        "gemma": {"head_dim": 32},
        "glm": {},
        "glm4": {},
        "gpt2": {},
        "gpt_bigcode": {},
        "gpt_neox": {},
        "gpt_neox_japanese": {},
        "gptj": {},
        "granite": {},
        "helium": {},
        "hunyuan_v1_dense": {},
        "hyperclovax": {},
        "jais2": {},
        "ministral3": {},
        "nanochat": {},
        "nemotron": {},
        "olmo": {},
        "olmo2": {},
        "opt": {},
        "persimmon": {},
        "phi": {},
        "phi3": {},
        "qwen2": {},
        "qwen3": {"head_dim": 32},
        "seed_oss": {},
        "smollm3": {},
        "stablelm": {},
        "starcoder2": {"sliding_window": None},
        "xglm": {},
    },
    "Mixture of experts": {
        "cohere2_moe": {},
        "dbrx": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "dots1": {"n_shared_experts": 1, "max_window_layers": 1},
        "ernie4_5_moe": {},
        "flex_olmo": {},
        "glm4_moe": {},
        "granitemoe": {},
        "granitemoeshared": {},
        "hunyuan_v1_moe": {},
        "hy_v3": {},
        "jetmoe": {},
        "minimax_m2": {},
        "mixtral": {"sliding_window": None},
        "olmoe": {},
        "phimoe": {},
        "qwen2_moe": {},
        "qwen3_moe": {},
        "solar_open": {},
    },
    "Sliding windows": {
        "afmoe": _SLIDING_AND_FULL,
        "cohere2": _SLIDING_AND_FULL,
        "cwm": _SLIDING,
        "exaone4": _SLIDING_AND_FULL,
        "exaone_moe": _SLIDING_AND_FULL,
        "gemma2": {"head_dim": 32, **_SLIDING},
        "gemma3": {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "num_hidden_layers": 4,
            **_SLIDING,
            "sliding_window_pattern": 2,
        },
        "gpt_neo": {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "window_size": WINDOW,
            "base_lacks": {"static cache"},
        },
        "gpt_oss": _SLIDING,
        "granite_swa": _SLIDING,
        "granitemoe_swa": _SLIDING,
        "laguna": _SLIDING_AND_FULL,
        "mellum": _SLIDING_AND_FULL,
        "mimo_v2_flash": _SLIDING,
        "ministral": _SLIDING,
        "mistral": _SLIDING,
        "modernbert-decoder": {"local_attention": WINDOW},
        "olmo3": _SLIDING_AND_FULL,
        "phi3:sliding": _SLIDING,
        "qwen2:sliding": {**_SLIDING, "use_sliding_window": True, "max_window_layers": 1},
        "starcoder2:sliding": _SLIDING,
        "vaultgemma": _SLIDING,
    },
    "Chunks": {
        "llama4": {
            "model_type": "llama4_text",
            "attention_chunk_size": WINDOW,
            "num_hidden_layers": 4,
            "floor_scale": 8,
            "intermediate_size_mlp": 96,
            "base_lacks": {"static cache", "left padding"},
        },
    },
    "K/V shared between layers": {
        "gemma3n": {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **_SLIDING,
        },
        "gemma4": {
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **_SLIDING,
        },
        "gemma4_unified": {"model_type": "gemma4_unified_text", "global_head_dim": 32, **_SLIDING},
    },
    "ALiBi": {
        "bloom": {"base_lacks": {"static cache"}},
        "falcon:alibi": {"alibi": True, "multi_query": False, "base_lacks": {"static cache"}},
        "mpt": {"base_lacks": {"chunked prefill", "conversation"}},
    },
    "Latent attention (MLA)": {
        "deepseek_v2": _MLA,
        "deepseek_v3": {**_MLA, "n_group": 2, "topk_group": 1},
        "glm4_moe_lite": _MLA,
        "longcat_flash": {**_MLA, "num_layers": 2, "zero_expert_num": 2, "moe_topk": 2},
        "minicpm3": _MLA,
        "youtu": _MLA,
    },
    HYBRIDS: {
        "bamba": {**_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 3},
        "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, "num_hidden_layers": 2},
        "granitemoehybrid": {**_MAMBA, **_RECURRENT_AND_FULL, "num_hidden_layers": 4, "shared_intermediate_size": 32},
        "kimi_linear": {
            **_MLA,
            **_RECURRENT_AND_FULL,
            "num_hidden_layers": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "n_group": 1,
        },
        "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
        "lfm2_moe": {
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
        },
        "nemotron_h": {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        "olmo_hybrid": {**_RECURRENT_AND_FULL, "num_hidden_layers": 4},
        "qwen3_5": {"model_type": "qwen3_5_text", **_RECURRENT_AND_FULL, "num_hidden_layers": 4},
        "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **_RECURRENT_AND_FULL, "num_hidden_layers": 4},
        "qwen3_next": {**_RECURRENT_AND_FULL, "num_hidden_layers": 4},
        "zamba2": {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "n_mamba_heads": 4,
            "mamba_d_state": 16,
        },
    },
    MAMBA_1: {
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "base_lacks": {"chunked prefill", "conversation"},
        },
        "zamba": {
            "base_lacks": {"chunked prefill", "conversation"},
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
        },
    },
    RECURRENT: {
        "mamba2": {
            "num_heads": 8,
            "state_size": 16,
            "n_groups": 1,
            "head_dim": 16,
            "chunk_size": 16,
            "base_lacks": {"chunked prefill", "conversation"},
        },
    },
}

# What is refused, each with what the error says.
REFUSED: dict[str, dict] = {
    "bert": {"why": "not causal"},
    "cpmant": {"why": "not causal"},
    "deepseek_v32": {**_MLA, "n_group": 2, "topk_group": 1, "why": "does not run with a prefix"},
    "falcon_mamba": {"why": "no attention layer"},
    "glm_moe_dsa": {**_MLA, "why": "does not run with a prefix"},
    "hrm_text": {"why": "runs one attention module as several layers"},
    "mamba": {"why": "no attention layer"},
    "minimax": {"why": "cache of its own"},
    "openai-gpt": {"why": "no attention layer"},
    "recurrent_gemma": {"why": "does not count positions from 0"},
    "roberta": {"why": "does not count positions from 0", "is_decoder": True},
    "rwkv": {"why": "no attention layer"},
    "trocr": {"why": "does not take `position_ids`"},
    "xlnet": {"why": "no attention layer"},
    "zaya": {"why": "does not run with a prefix", "num_experts_per_tok": 1},
}

# What models that read media beside text read, by model type; their tiny configs are in `multimodal_configs`.
MULTIMODAL = {
    "llava": "images",
    "mistral3": "images",
    "idefics3": "images",
    "smolvlm": "images",
    "internvl": "images",
    "llama4": "images",
    "qwen2_vl": "images",
    "qwen2_5_vl": "images",
    "qwen3_vl": "images",
    "qwen3_5": "images",
    "gemma3": "images",
    "gemma3n": "images, audio",
    "gemma4": "images",
    "qwen2_audio": "audio",
    "voxtral": "audio",
}
# Whether the recurrent layers of a kind start from states that train with the K/V.
STATES = {HYBRIDS: "yes", MAMBA_1: "no", RECURRENT: "yes"}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.architectures_page import rewrite

    rewrite()
