"""The form in which vLLM caches what `transformers` caches for the same layer.

A prefix holds what `transformers` caches. Most models in vLLM cache the same numbers in the same order. The others are
listed here, each with the place in vLLM that differs. What is not known is refused, since a wrong order gives fluent
but wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peft_prefix_ext.checkpoint.format import LayerKV
from vllm_plugin.errors import PrefixServeError

Reorder = Callable[[torch.Tensor], torch.Tensor]


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def halves_to_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., a0 a1 a2 b0 b1 b2]` to `[..., a0 b0 a1 b1 a2 b2]`."""
    return torch.stack(tensor.chunk(2, dim=-1), dim=-1).flatten(-2)


def pairs_to_halves(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., a0 b0 a1 b1 a2 b2]` to `[..., a0 a1 a2 b0 b1 b2]`."""
    return torch.cat([tensor[..., 0::2], tensor[..., 1::2]], dim=-1)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How vLLM caches a layer.

    Args:
        kv_lora_rank: With latent attention (MLA), the width of the latent `kv_c`, which a prefix holds as its key. The
            rotated part `k_pe` of the keys is its value. Both have one head. None: keys and values.
        reorder_key: Orders the last dimension of a prefix's keys as vLLM does.
        reorder_value: The same for its values.
        attentions_per_layer: Attention modules, each with a cache, that vLLM counts as one decoder layer.
    """

    kv_lora_rank: int | None = None
    reorder_key: Reorder = unchanged
    reorder_value: Reorder = unchanged
    attentions_per_layer: int = 1

    def apply(self, kv: LayerKV) -> LayerKV:
        """Returns the K/V of a prefix, `[num_kv_heads, num_virtual_tokens, head_dim]` each, as vLLM orders them."""
        return LayerKV(self.reorder_key(kv.key), self.reorder_value(kv.value))


AS_TRANSFORMERS = CacheLayout()

# vLLM's `MultiHeadLatentAttentionWrapper` rotates neighbouring dimensions (`is_neox_style=False`) in each of these.
_LATENT: dict[str, Reorder] = {
    # So does transformers, which multiplies complex numbers.
    "deepseek_v2": unchanged,
    # transformers moves the first of each pair to the first half, rotates, and caches the halves
    # (`apply_rotary_pos_emb_interleave`).
    "axk1": halves_to_pairs,
    "deepseek_v3": halves_to_pairs,
    "glm4_moe_lite": halves_to_pairs,
    "kimi_k2": halves_to_pairs,
    "longcat_flash": halves_to_pairs,
}
_KEYS: dict[str, Reorder] = {
    # `Llama4ForCausalLM.permute_qk_weight_for_rotary` permutes the weights of queries and keys when it loads them, also
    # in layers without rotary embedding.
    "llama4_text": pairs_to_halves,
}
# `K2HorizonModel.load_weights` permutes the weights of keys, and transformers has no such model to compare with.
_UNKNOWN = ("k2_horizon",)


def cache_layout(model_config: Any) -> CacheLayout:
    """Returns how vLLM caches the attention layers of a model.

    Args:
        model_config: vLLM's `ModelConfig`.

    Raises:
        PrefixServeError: If that is not known, or if the model in vLLM is another one than in `transformers`.
    """
    config = model_config.hf_text_config
    kv_lora_rank = config.kv_lora_rank if model_config.use_mla else None
    if model_config.using_transformers_backend():
        # vLLM takes K/V or latents from transformers' own attention, and loads the weights as they are.
        return CacheLayout(kv_lora_rank)
    if config.model_type in _UNKNOWN or (kv_lora_rank is not None and config.model_type not in _LATENT):
        raise PrefixServeError(
            f"Prefix adapters do not support {config.model_type} models: the order in which vLLM caches their keys is not "
            "known; start without them."
        )
    if kv_lora_rank is None:
        return CacheLayout(reorder_key=_KEYS.get(config.model_type, unchanged))
    reorder = _LATENT[config.model_type]
    if reorder is halves_to_pairs and not getattr(config, "rope_interleave", True):
        raise PrefixServeError(
            'Prefix adapters do not support "rope_interleave": false, which vLLM ignores: its base model answers '
            "differently than the one that the prefix was trained on; start with --model-impl transformers."
        )
    return CacheLayout(
        kv_lora_rank,
        reorder_value=reorder,
        # As in vLLM's `GPUModelRunner.initialize_kv_cache_tensors`.
        attentions_per_layer=2 if config.model_type == "longcat_flash" else 1,
    )


def total_num_kv_heads(model_config: Any) -> int:
    """Returns the KV heads per layer of the whole model, as vLLM caches them."""
    return 1 if model_config.use_mla else model_config.get_total_num_kv_heads()
