"""How vLLM orders what transformers caches: compared with the code of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama4 import Llama4ForCausalLM

from peft_prefix_ext.checkpoint.format import LayerKV
from vllm_plugin.adapters.cache_layout import cache_layout, total_num_kv_heads
from vllm_plugin.errors import PrefixServeError

# A latent, and its size in vLLM's cache.
LATENT = {"kv_lora_rank": 6}
HEADS, TOKENS, SIZE = 2, 5, 8


def model_config(model_type: str, *, use_mla: bool = True, through_transformers: bool = False, **config: Any) -> Any:
    """Returns what `cache_layout` reads of vLLM's `ModelConfig`."""
    return SimpleNamespace(
        hf_text_config=SimpleNamespace(model_type=model_type, **config),
        use_mla=use_mla,
        using_transformers_backend=lambda: through_transformers,
        get_total_num_kv_heads=lambda: HEADS,
    )


def kv() -> LayerKV:
    return LayerKV(torch.randn(1, TOKENS, 6), torch.randn(1, TOKENS, SIZE))


def test_rotated_keys_of_a_latent_are_those_that_vllm_rotates() -> None:
    projected = torch.randn(TOKENS, 1, SIZE)
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(SIZE, max_position=16, is_neox_style=False, rope_parameters=None, dtype=torch.float32)
        _, expected = rotary.forward_native(torch.arange(TOKENS), projected.clone(), projected.clone())
    angles = torch.arange(TOKENS)[:, None] / 10000 ** (torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = (torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    states = projected.transpose(0, 1)[None]
    _, cached = apply_rotary_pos_emb_interleave(states, states, cos, sin)
    latent = torch.randn(1, TOKENS, 6)
    key, value = cache_layout(model_config("deepseek_v3", **LATENT, rope_interleave=True)).apply(
        LayerKV(latent, cached[0])
    )
    assert key is latent
    torch.testing.assert_close(value, expected.transpose(0, 1))
    assert not torch.allclose(cached[0], expected.transpose(0, 1))


def test_keys_of_llama4_are_those_of_the_weights_that_vllm_permutes() -> None:
    weight, states = torch.randn(HEADS * SIZE, 12), torch.randn(TOKENS, 12)
    loader: Any = SimpleNamespace(config=SimpleNamespace(num_key_value_heads=HEADS))
    _, permuted = Llama4ForCausalLM.permute_qk_weight_for_rotary(loader, "layers.0.self_attn.k_proj.weight", weight)
    cached, expected = ((states @ rows.T).unflatten(-1, (HEADS, SIZE)).transpose(0, 1) for rows in (weight, permuted))
    layout = cache_layout(model_config("llama4_text", use_mla=False))
    key, value = layout.apply(LayerKV(cached, cached))
    assert layout.kv_lora_rank is None
    torch.testing.assert_close(key, expected)
    assert value is cached


@pytest.mark.parametrize(
    "config",
    [
        model_config("llama", use_mla=False),
        # With latents that vLLM does not cache.
        model_config("minicpm3", use_mla=False, **LATENT),
        model_config("deepseek_v2", **LATENT),
        # transformers' own attention, in vLLM.
        model_config("deepseek_v3", through_transformers=True, rope_interleave=True, **LATENT),
        model_config("deepseek_v3", through_transformers=True, rope_interleave=False, **LATENT),
        model_config("anything", through_transformers=True, **LATENT),
        model_config("llama4_text", through_transformers=True, use_mla=False),
    ],
)
def test_all_others_are_as_transformers_caches_them(config: Any) -> None:
    given, layout = kv(), cache_layout(config)
    assert layout.apply(given) == given
    assert layout.kv_lora_rank == (6 if config.use_mla else None)
    assert total_num_kv_heads(config) == (1 if config.use_mla else HEADS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model_config("pangu_ultra_moe", **LATENT), "do not support pangu_ultra_moe models: the order"),
        (model_config("k2_horizon", use_mla=False), "do not support k2_horizon models: the order"),
        (model_config("glm4_moe_lite", rope_interleave=False, **LATENT), "start with --model-impl transformers"),
    ],
)
def test_what_is_not_known_is_refused(config: Any, message: str) -> None:
    with pytest.raises(PrefixServeError, match=message):
        cache_layout(config)
