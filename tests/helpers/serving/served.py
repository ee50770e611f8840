"""What the tests serve, by name as in `helpers.architectures`: the tests run these lists, and a page shows them."""

from __future__ import annotations

# vLLM supports only tied embeddings here.
_TIED = {"tie_word_embeddings": True}

# By name: fields of the config that differ.
EXACT: dict[str, dict] = {
    # With layers that share K/V, and heads of two sizes.
    "gemma4": {"num_experts": None},
    # With sinks, windows in every other layer, and experts.
    "gpt_oss": {},
    # With learned positions.
    "gpt2": {},
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
    "cohere": _TIED,
    "gemma2": _TIED,
    "gemma3n": _TIED,
    "bloom": {**_TIED, "head_dim": ...},
    "falcon:multi-query": {"head_dim": ..., "ffn_hidden_size": 512},
}
_RECURRENT = r"do not support models with Mamba or linear-attention layers"
_MLA = {"head_dim": ...}
_OTHER_FORM = r"vLLM's cache has .*whose K/V vLLM keeps in another form"
# By name: the error, and fields of the config that differ.
REFUSED: dict[str, tuple[str, dict]] = {
    "llama4": (r"plain attention layers only.* of type ChunkedLocalAttentionSpec", {}),
    "deepseek_v2": (r"do not support multi-head latent attention \(MLA\)", _MLA),
    "deepseek_v3": (r"do not support multi-head latent attention \(MLA\)", _MLA),
    "falcon": (_OTHER_FORM, {"head_dim": ..., "ffn_hidden_size": 512}),
    "minicpm3": (_OTHER_FORM, {"head_dim": ...}),
    "glm4_moe_lite": (r"do not support multi-head latent attention \(MLA\)", _MLA),
    **{
        name: (_RECURRENT, {})
        for name in ("falcon_h1", "jamba", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_next", "zamba2")
    },
}

# Hybrids whose recurrent layers start from trained states; fields of the config that differ.
HYBRIDS: dict[str, dict] = {}
# Models that read media, as in `MULTIMODAL` there: with text alone, and with pictures in their prompts as well.
MULTIMODAL_TEXT: list[str] = []
MULTIMODAL_IMAGES: list[str] = []
