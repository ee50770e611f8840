"""What the tests serve, by name as in `helpers.architectures`: the tests run these lists, and a page shows them."""

from __future__ import annotations

# vLLM supports only tied embeddings here.
_TIED = {"tie_word_embeddings": True}

# Latents of the one size that vLLM supports. Published checkpoints route with these, for which transformers has no field.
_LATENT = {
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
# Two of the prefixes fill a chunk or more. vLLM scales queries by their position only in long contexts.
_CHUNKED = {"attention_chunk_size": 32, "attn_temperature_tuning": False, "num_experts_per_tok": 1}

# By name: fields of the config that differ.
EXACT: dict[str, dict] = {
    # With layers that share K/V, and heads of two sizes.
    "gemma4": {"num_experts": None},
    # With sinks, windows in every other layer, and experts.
    "gpt_oss": {},
    # With learned positions.
    "gpt2": {},
    "deepseek_v3": _LATENT,
    "llama4": _CHUNKED,
}
# Without fields that differ.
PLAIN = [
    *("llama", "apertus", "arcee", "bitnet", "ctrl", "ernie4_5", "gemma", "glm", "glm4", "gpt_bigcode"),
    *("gpt_neox", "gptj", "granite", "helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "ministral3"),
    *("nanochat", "nemotron", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2", "flex_olmo", "glm4_moe", "granitemoe"),
    *("granitemoeshared", "hunyuan_v1_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open"),
    *("cwm", "exaone4", "exaone_moe", "gemma3", "mellum", "ministral", "mistral", "olmo3", "phi3:sliding"),
    *("starcoder2:sliding", "vaultgemma", "gemma4_unified"),
]
SOAK: dict[str, dict] = {
    **{name: {} for name in PLAIN},
    "deepseek_v2": {**_LATENT, "n_group": 1},
    "glm4_moe_lite": _LATENT,
    "cohere": _TIED,
    "gemma2": _TIED,
    "gemma3n": _TIED,
    "bloom": {**_TIED, "head_dim": ...},
    "falcon:multi-query": {"head_dim": ..., "ffn_hidden_size": 512},
}
_OTHER_FORM = r"vLLM's cache has .*whose K/V vLLM keeps in another form"
# By name: the error, and fields of the config that differ.
REFUSED: dict[str, tuple[str, dict]] = {
    "falcon": (_OTHER_FORM, {"head_dim": ..., "ffn_hidden_size": 512}),
    "minicpm3": (_OTHER_FORM, {"head_dim": ...}),
}


# By title: the name, fields of the config that differ, and settings of the engine.
VARIANTS: dict[str, tuple[str, dict, dict]] = {
    "axk1": ("deepseek_v3", {**_LATENT, "model_type": "axk1", "first_k_dense_replace": 0}, {}),
    # Then vLLM keeps the chunks that no query reads.
    "chunks-in-full-cache": ("llama4", _CHUNKED, {"disable_hybrid_kv_cache_manager": True}),
    # These latents are ordered as transformers has them.
    "transformers-backend": ("deepseek_v3", _LATENT, {"model_impl": "transformers"}),
    "halves": ("deepseek_v3", {**_LATENT, "rope_interleave": False}, {"model_impl": "transformers"}),
    "tensor-parallel": ("deepseek_v3", _LATENT, {"tensor_parallel_size": 2}),
    "chunks-tensor-parallel": ("llama4", _CHUNKED, {"tensor_parallel_size": 2}),
}
# Too few blocks for the requests: they are split into chunks, and some of the first model's are preempted. Those of the
# second seldom need another of their longer blocks while they decode.
SMALL: dict[str, tuple[dict, dict]] = {
    "deepseek_v3": (_LATENT, {"num_gpu_blocks_override": 20}),
    "llama4": (_CHUNKED, {"num_gpu_blocks_override": 16}),
}

# Hybrids, whose recurrent layers start from zero or from trained states: fields of the config that differ. vLLM reads
# fields of LFM2 that a config made here does not have by itself.
HYBRIDS: dict[str, dict] = {
    "lfm2": {"conv_dim": 128, "block_dim": 128, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    "qwen3_next": {},
    "qwen3_5": {},
    "granitemoehybrid": {"mamba_d_head": 64},
    # transformers clamps time steps from below, vLLM does not: log-probabilities differ by 3e-3 without any prefix.
    "nemotron_h": {"time_step_min": 1e-9},
    "falcon_h1": {},
}
# Models that read media, as in `vision_configs.py`: with pictures in their prompts, and with text alone.
MULTIMODAL_IMAGES = ["qwen3_vl", "qwen2_5_vl", "mistral3", "qwen3_5"]
MULTIMODAL_TEXT = [*MULTIMODAL_IMAGES, "llava", "idefics3", "smolvlm", "internvl", "gemma3", "gemma4", "llama4"]
