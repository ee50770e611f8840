"""The layers of a model that keep something of the text, found by a probe: one forward pass with a cache that records.

For every layer that writes K/V or states, the probe gives the module, its index in the cache and what it wrote. With one
token it finds the shapes, with a text it yields the K/V and states of that text. It replaces the model's config as the
source of shapes: configs are wrong or silent about them for many architectures (latent attention, multi-query
attention, hybrid models).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.offloaded import input_device
from peft_prefix_ext.base_model.recording import RecordingCache, running_modules
from peft_prefix_ext.base_model.rope_deltas import without_rope_deltas
from peft_prefix_ext.base_model.states import ProbedState
from peft_prefix_ext.base_model.supported import check_supported
from peft_prefix_ext.base_model.tensor_parallel import (
    ShardedHeads,
    broadcast_to_tensor_parallel,
    gather_heads,
    tensor_parallel_mesh,
)
from peft_prefix_ext.base_model.zero3 import gathered_parameters
from peft_prefix_ext.checkpoint.format import ATTENTIONS, CROSS, DECODER, ENCODER, LayerKV


@dataclass(frozen=True)
class ProbedLayer:
    """One attention layer, as the probe found it.

    Args:
        module: The name of the attention module in the model.
        index: Its layer index in the cache. In an encoder-decoder model the indices go on from the decoder's
            self-attention to cross-attention and the encoder.
        kv: The K/V of the tokens of the probe, `[num_kv_heads, num_tokens, head_dim]` each, of all positions even in a
            layer with a sliding window.
        sliding_window: How many positions a query sees, itself included; `None` for all.
        attention: The kind of attention, one of `ATTENTIONS`.
        is_chunked: Whether a query sees the positions of its own chunk, instead of the last ones.
        in_hybrid: Whether the model also has recurrent or convolutional layers.
        heads: How the heads are sharded in a tensor-parallel model; `kv` has all heads.
    """

    module: str
    index: int
    kv: LayerKV
    sliding_window: int | None
    attention: str = DECODER
    is_chunked: bool = False
    in_hybrid: bool = False
    heads: ShardedHeads | None = None

    def local_heads(self, full: torch.Tensor) -> torch.Tensor:
        """Returns the heads of this process, `[num_local_heads, ...]`, of a K or V of all heads."""
        return full if self.heads is None else self.heads.local(full)

    def shapes(self, num_virtual_tokens: int) -> tuple[list[int], list[int]]:
        """Returns the K and V shapes of a prefix for this layer."""
        key, value = ([tensor.shape[0], num_virtual_tokens, tensor.shape[2]] for tensor in self.kv)
        return key, value


class ProbedModel(NamedTuple):
    """The attention layers and the recurrent layers of a model, each in order of their index."""

    layers: list[ProbedLayer]
    states: list[ProbedState]


def probe_model(model: PreTrainedModel) -> ProbedModel:
    """Returns the layers of `model`, with the K/V and the states of one token.

    Raises:
        ValueError: If the model is not causal, does not count positions from 0, or is not supported for another reason.
    """
    check_supported(model)
    name = describe(model)
    # Some models count no position for padding.
    first, second, third = [
        token for token in range(4) if token != getattr(model.config.get_text_config(), "pad_token_id", None)
    ][:3]
    zero = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    # The encoder input stays the same while the decoder input changes.
    encoder_input = {"input_ids": zero + first} if model.config.is_encoder_decoder else {}
    probed = record(model, [first])
    layers = probed.layers
    if len({layer.module for layer in layers}) < len(layers):
        raise ValueError(f"{name} runs one attention module as several layers, which PREFIX_EXT does not support.")
    # With activations in int8, the scales and so the K/V depend on the whole batch.
    tolerance = (
        0.1 if getattr(model, "hf_quantizer", None) is not None else 1e-5 if model.dtype == torch.float32 else 2e-2
    )
    if not _same_first_token(
        record_layers(model, [first, second], **encoder_input),
        record_layers(model, [first, third], **encoder_input),
        tolerance,
    ):
        raise ValueError(f"{name} is not causal: its first token sees later ones, which PREFIX_EXT does not support.")
    # Without attention nothing depends on positions, and the model may not take any.
    if layers and not _same_first_token(layers, record_layers(model, [first], position_ids=zero), tolerance):
        raise ValueError(f"{name} does not count positions from 0, which PREFIX_EXT does not support.")
    return probed


def _same_first_token(some: list[ProbedLayer], others: list[ProbedLayer], tolerance: float) -> bool:
    """Whether the K/V of the first token are the same, up to rounding (experts batch other tokens with it)."""
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one.kv, other.kv, strict=True):
            if not torch.allclose(a[:, :1], b[:, :1], rtol=0.0, atol=tolerance * float(a.abs().max())):
                return False
    return True


def record_layers(model: PreTrainedModel, token_ids: list[int], **inputs: Any) -> list[ProbedLayer]:
    """Returns the attention layers of `model` with the K/V of a text, as `record` does."""
    return record(model, token_ids, **inputs).layers


@torch.no_grad()
def record(model: PreTrainedModel, token_ids: list[int], **inputs: Any) -> ProbedModel:
    """Runs the frozen `model` on `token_ids` at positions 0, 1, ... and returns its layers with what they keep of them.

    In an encoder-decoder model both the encoder and the decoder read the tokens. The layers are in order of their index:
    the decoder's self-attention, cross-attention, the encoder's self-attention.

    Args:
        model: The base model.
        token_ids: The tokens, at least one.
        inputs: Other arguments of the model's forward, which replace those made from `token_ids`.

    Raises:
        ValueError: If the model has no layer with a KV cache or states.
    """
    cache_name = cache_argument(model) or "past_key_values"  # some models pass on arguments that they do not name
    ids = torch.tensor([token_ids], device=input_device(model))
    broadcast_to_tensor_parallel(model, ids)  # they may be random
    with running_modules(model) as running, ExitStack() as hooks:
        if model.config.is_encoder_decoder:
            # The decoder has a config of its own: other numbers of layers (T5), sliding windows (T5Gemma).
            configs = {DECODER: model.get_decoder().config}
            caches = {attention: RecordingCache(configs.get(attention), running) for attention in ATTENTIONS}
            both = EncoderDecoderCache(caches[DECODER], caches[CROSS])
            inputs = {"input_ids": ids, "decoder_input_ids": ids, cache_name: both, **inputs}
            for module in _encoder_attentions(model):
                hooks.callback(_pass_cache_to(module, caches[ENCODER]).remove)
        else:
            caches = {DECODER: RecordingCache(model.config, running)}
            inputs = {"input_ids": ids, cache_name: caches[DECODER], "use_cache": True, **inputs}
        try:
            with eval_mode(model):
                # Classification heads look for an end-of-sequence token, which the tokens may not have.
                (model.base_model if model.config.is_encoder_decoder else model)(**inputs)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{describe(model)} does not run with a cache that records: {error}") from error
    if not caches[DECODER].written and not caches[DECODER].mixers:
        raise ValueError(f"{describe(model)} has no attention layer with a KV cache to give a prefix to.")
    states = [ProbedState(module, index, states) for index, (module, states) in caches[DECODER].final_states().items()]
    return ProbedModel(_layers_of(model, caches), states)


def _layers_of(model: PreTrainedModel, caches: dict[str, RecordingCache]) -> list[ProbedLayer]:
    """Returns the layers that wrote into `caches`, one cache for each kind of attention."""
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    layers: list[ProbedLayer] = []
    for attention, cache in caches.items():
        first = len(layers)
        for index, (module, kv) in sorted(cache.written.items()):
            sliding_window = getattr(cache.layers[index], "sliding_window", None)
            is_chunked = attention == DECODER and layer_types[index : index + 1] == ["chunked_attention"]
            layers.append(
                ProbedLayer(module, first + index, kv, sliding_window, attention, is_chunked, bool(cache.mixers))
            )
    if (mesh := tensor_parallel_mesh(model)) is None:
        return layers
    gathered = [gather_heads(model.get_submodule(layer.module), layer.kv, mesh) for layer in layers]
    return [replace(layer, kv=kv, heads=heads) for layer, (kv, heads) in zip(layers, gathered, strict=True)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs `model` in eval mode, with its parameters gathered under ZeRO-3, and restores what calls change in it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        # In eval mode on a CPU, bitsandbytes packs 4-bit weights in a layout that passes no gradient on.
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        with gathered_parameters(model), without_rope_deltas(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _encoder_attentions(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the attention modules of the encoder that take a cache: those whose class serves cross-attention too."""
    return [
        module
        for module in model.get_encoder().modules()
        if "key_value_states" in inspect.signature(module.forward).parameters and cache_argument(module)
    ]


def _pass_cache_to(attention: nn.Module, cache: Cache) -> RemovableHandle:
    """Passes an attention module a cache, where its model passes none."""
    name = cache_argument(attention)
    assert name is not None

    def add_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, name: cache}

    return attention.register_forward_pre_hook(add_cache, with_kwargs=True)
