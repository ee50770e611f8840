"""The trainable architectures in vLLM: served exactly, or refused at the start with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.serving.architectures import Served, forget_engine
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool
from vllm_plugin.errors import PrefixServeError

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
# Too few blocks for the requests: they are split into chunks, and some preempted.
SMALL: dict[str, tuple[dict, dict]] = {
    "deepseek_v3": (_LATENT, {"num_gpu_blocks_override": 20}),
    "llama4": (_CHUNKED, {"block_size": 16, "num_gpu_blocks_override": 30}),
}


@pytest.fixture
def serve(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    served: list[Served] = []

    def start(name: str, config: dict, **settings) -> Served:
        if "kv_lora_rank" in config:
            avoid_defects(monkeypatch)
        served.append(Served(name, tmp_path, config, **settings))
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAK)])
def test_same_tokens_as_peft_cold_and_warm(name: str, serve: Callable[..., Served]):
    served = serve(name, {**EXACT, **SOAK}[name])
    assert len({tuple(logprobs) for _, logprobs in served.expected}) == len(served.requests)
    served.check()
    served.check()


@pytest.mark.soak
@pytest.mark.parametrize("title", VARIANTS)
def test_variants_have_the_same_tokens(
    title: str, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers must not share threads.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if title.endswith("tensor-parallel") else "auto")
    name, config, settings = VARIANTS[title]
    served = serve(name, config, **settings)
    served.check()
    served.check()


@pytest.mark.parametrize("name", SMALL)
def test_same_tokens_after_chunks_preemption_and_reset(name: str, serve: Callable[..., Served]) -> None:
    config, settings = SMALL[name]
    served = serve(name, config, max_num_batched_tokens=48, max_num_seqs=8, **settings)
    served.check()
    served.check()
    assert served.llm.reset_prefix_cache()
    served.check()
    assert served.num_preemptions() > 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama4" else pytest.mark.soak) for name in REFUSED]
)
def test_is_refused_at_the_start(name: str, serve: Callable[..., Served]):
    why, config = REFUSED[name]
    with pytest.raises(PrefixServeError, match=why):
        serve(name, config)
