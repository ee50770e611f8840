"""What the attention layers of a model look like, found by looking at what they write into its cache.

One forward pass with a cache that records gives, for every layer that owns a KV cache, its module, its index and the
K/V themselves: of one token it is a probe of the shapes, of a text it is the K/V of that text. Configs lie about this
for a fair share of architectures (see PEFT's failures on MLA, multi-query and hybrid models); the cache does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from peft_prefix_ext.attention.flash import KNOWN, attention_of, uses_flash
from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.offloaded import device_of
from peft_prefix_ext.base_model.tensor_parallel import SpreadHeads, share, with_all_heads
from peft_prefix_ext.base_model.zero3 import gathering
from peft_prefix_ext.checkpoint.format import ATTENTIONS, CROSS, DECODER, ENCODER, LayerKV


@dataclass(frozen=True)
class ProbedLayer:
    """One attention layer as it wrote into the cache.

    Args:
        module: The name of the attention module within the model.
        index: Its layer index in the cache; the layers of an encoder-decoder model count on through its kinds of
            attention.
        kv: The K/V of the recorded tokens, `[num_kv_heads, num_tokens, head_dim]` each, without positions cut off by a
            sliding window.
        sliding_window: How many positions a query of this layer sees, itself included; `None` for all.
        is_chunked: Whether those are the ones of its own chunk of the sequence, and not the last.
        attention: Its kind, one of `ATTENTIONS`.
        in_hybrid: Whether the model has recurrent or convolutional layers besides.
        heads: How its heads are spread over processes, if they are; `kv` has those of all.
    """

    module: str
    index: int
    kv: LayerKV
    sliding_window: int | None
    attention: str = DECODER
    is_chunked: bool = False
    in_hybrid: bool = False
    heads: SpreadHeads | None = None

    def own(self, state: torch.Tensor) -> torch.Tensor:
        """Returns the heads of this process, `[num_own_heads, ...]`, of a K or V of all."""
        return state if self.heads is None else self.heads.own(state)

    def shapes(self, num_virtual_tokens: int) -> tuple[list[int], list[int]]:
        """Returns the K and V shapes of a prefix for this layer."""
        key, value = ([tensor.shape[0], num_virtual_tokens, tensor.shape[2]] for tensor in self.kv)
        return key, value


class _RecordingCache(DynamicCache):
    def __init__(self, config: Any, running: list[str]) -> None:
        super().__init__(config=config)
        self.running = running
        self.recorded: dict[int, tuple[str, LayerKV]] = {}
        self.has_states = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer_idx = len(self.recorded) if layer_idx is None else layer_idx  # encoders need not count their layers
        if key_states.dim() != 4:
            raise ValueError(
                f"Layer {layer_idx} caches keys of shape {list(key_states.shape)}, which PREFIX_EXT does not support."
            )
        # A layer that shares the K/V of another one does not write; the first writer owns the cache.
        self.recorded.setdefault(layer_idx, (self.running[-1], LayerKV(key_states[0], value_states[0])))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.has_states = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.has_states = True
        return super().update_recurrent_state(*args, **kwargs)


def probe_layers(model: PreTrainedModel) -> list[ProbedLayer]:
    """Returns the layers of `model`, in order of their index, with the K/V of one token.

    Raises:
        ValueError: If a prefix cannot stand before this model's input, or would silently change more than that.
    """
    refuse_unsupported(model)
    name = describe(model)
    # Some models count no position for padding.
    first, second, third = [
        token for token in range(4) if token != getattr(model.config.get_text_config(), "pad_token_id", None)
    ][:3]
    at_zero = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    # What an encoder reads must be the same whenever the decoder is looked at.
    read = {"input_ids": at_zero + first} if model.config.is_encoder_decoder else {}
    short = record_layers(model, [first])
    placed = record_layers(model, [first], position_ids=at_zero)
    if len({layer.module for layer in short}) < len(short):
        raise ValueError(f"{name} runs one attention module as several layers, which PREFIX_EXT does not support.")
    # Activations that are rounded to 8 bits are so by what else is in the batch.
    tolerance = (
        0.1 if getattr(model, "hf_quantizer", None) is not None else 1e-5 if model.dtype == torch.float32 else 2e-2
    )
    if not _same_first_token(
        record_layers(model, [first, second], **read), record_layers(model, [first, third], **read), tolerance
    ):
        raise ValueError(f"{name} is not causal: its first token sees later ones, which PREFIX_EXT does not support.")
    if not _same_first_token(short, placed, tolerance):
        raise ValueError(f"{name} does not count positions from 0, which PREFIX_EXT does not support.")
    return short


def _same_first_token(some: list[ProbedLayer], others: list[ProbedLayer], tolerance: float) -> bool:
    """Whether the first token's K/V are the same, but for rounding (experts are given other tokens at a time)."""
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one.kv, other.kv, strict=True):
            if not torch.allclose(a[:, :1], b[:, :1], rtol=0.0, atol=tolerance * float(a.abs().max())):
                return False
    return True


@torch.no_grad()
def record_layers(model: PreTrainedModel, token_ids: list[int], **inputs: Any) -> list[ProbedLayer]:
    """Runs the frozen `model` on `token_ids` at positions 0.. and returns its layers, in order of their index.

    The encoder and the decoder of an encoder-decoder model both read them; the layers of the decoder come first, then its
    cross-attention and the encoder. Other inputs are passed on to the model.

    Raises:
        ValueError: If the model has no attention layer that a prefix can be given to.
    """
    running: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    cache_name = cache_argument(model) or "past_key_values"  # some models hand on what they do not name
    ids = torch.tensor([token_ids], device=device_of(model))
    share(model, ids)  # which may have been drawn at random
    if model.config.is_encoder_decoder:
        # The decoder has a config of its own: another number of layers (T5), sliding windows (T5Gemma).
        configs = {DECODER: model.get_decoder().config}
        caches = {attention: _RecordingCache(configs.get(attention), running) for attention in ATTENTIONS}
        both = EncoderDecoderCache(caches[DECODER], caches[CROSS])
        inputs = {"input_ids": ids, "decoder_input_ids": ids, cache_name: both, **inputs}
        handles += [_hook_cache(module, caches[ENCODER]) for module in _encoder_attentions(model)]
    else:
        caches = {DECODER: _RecordingCache(model.config, running)}
        inputs = {"input_ids": ids, cache_name: caches[DECODER], "use_cache": True, **inputs}
    try:
        with evaluating(model):
            # Heads for classification ask for an end-of-sequence token, which need not be among the tokens.
            (model.base_model if model.config.is_encoder_decoder else model)(**inputs)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{describe(model)} does not run with a cache that records: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not caches[DECODER].recorded:
        raise ValueError(f"{describe(model)} has no attention layer with a KV cache to give a prefix to.")
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    layers: list[ProbedLayer] = []
    for attention, cache in caches.items():
        before = len(layers)
        for index, (module, kv) in sorted(cache.recorded.items()):
            sliding_window = getattr(cache.layers[index], "sliding_window", None)
            is_chunked = attention == DECODER and layer_types[index : index + 1] == ["chunked_attention"]
            layers.append(
                ProbedLayer(module, before + index, kv, sliding_window, attention, is_chunked, cache.has_states)
            )
    return with_all_heads(model, layers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs `model` without dropout and the like, and leaves each module's mode as it was.

    Parameters that are spread over processes are there, whether training was prepared or not.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        # bitsandbytes' 4-bit layers, in eval mode on a CPU, pack their weights in a way that passes no gradient on.
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        with gathering(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _encoder_attentions(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the attention modules of the encoder to which K/V can be given: those that could be cross-attention, too."""
    return [
        module
        for module in model.get_encoder().modules()
        if "key_value_states" in inspect.signature(module.forward).parameters and cache_argument(module)
    ]


def _hook_cache(attention: nn.Module, cache: Cache) -> RemovableHandle:
    """Gives an attention module a cache that its model has not."""

    name = cache_argument(attention)
    assert name is not None

    def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, name: cache}

    return attention.register_forward_pre_hook(give, with_kwargs=True)


def refuse_unsupported(model: nn.Module) -> None:
    """Raises `ValueError` for a model whose output a prefix would silently get wrong."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"A prefix needs a transformers `PreTrainedModel`, got {type(model).__name__}.")
    config = model.config.get_text_config(decoder=True)
    name = describe(model)
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise ValueError(f"{name} reads `{model.main_input_name}` and not text, which PREFIX_EXT does not support.")
    if model.config.is_encoder_decoder and not uses_flash(config) and attention_of(config) not in KNOWN:
        raise ValueError(
            f"{name} runs attn_implementation={attention_of(config)!r}, with which PREFIX_EXT cannot test a prefix of an "
            "encoder-decoder model; load it with 'sdpa' or 'eager'."
        )
    layer_types = getattr(config, "layer_types", None) or []
    if uses_flash(config) and (getattr(config, "sliding_window", None) or "sliding_attention" in layer_types):
        raise ValueError(f"{name} has sliding windows: load it with attn_implementation='sdpa' for PREFIX_EXT.")
