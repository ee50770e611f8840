"""The prefix of one attention layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache

from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.cache_view import PrefixCacheView
from peft_prefix_ext.injection.decode_memo import memoize_for_decoding
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.dropout import PrefixDropout
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

MASK_ARGUMENTS = ("attention_mask", "mask")


class PrefixExtLayer(PrefixTunerLayer):
    """A child of an attention module, at work in a hook before its forward, so that base parameters keep their names.

    The hook runs inside a checkpointed region, where the model's cache does not reach.

    Args:
        attention: The attention module.
        recorded: What is known of it.
        runtime: What it shares with the other layers.
    """

    adapter_layer_names = ("prefix_ext_key", "prefix_ext_value")
    other_param_names = ("prefix_ext_frozen_key", "prefix_ext_frozen_value")

    def __init__(self, attention: nn.Module, recorded: ProbedLayer, runtime: PrefixDecoderHook) -> None:
        super().__init__(recorded.kv.key.device)
        self.prefix_ext_key = PrefixTensors(attention)
        self.prefix_ext_value = PrefixTensors(attention)
        self.prefix_ext_frozen_key = PrefixTensors(attention)
        self.prefix_ext_frozen_value = PrefixTensors(attention)
        self.module_name = recorded.module
        self.index = recorded.index
        self.attention = recorded.attention
        self.sliding_window = recorded.sliding_window
        self.heads = recorded.heads
        self.awaiting_weights: set[str] = set()
        self._runtime = (runtime,)  # in a tuple, so as not to become a submodule of every layer
        self._arguments, self._cache_argument, self._mask_argument = reachable_arguments(attention)
        self._handle = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    @property
    def runtime(self) -> PrefixDecoderHook:
        return self._runtime[0]

    def update_layer(self, adapter_name: str, initial: LayerKV, config: PrefixExtConfig, has_reparam: bool) -> None:
        """Adds an adapter that starts at `initial`, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

        With a reparameterization the initial K/V are what it adds to, or zeros where it yields the K/V by itself.
        """
        num_frozen = 0 if config.inference_mode else config.num_frozen_tokens
        trains = config.trains(self.index)
        for kind, state in zip(initial._fields, initial, strict=True):
            start = state[:, num_frozen:].clone()
            if has_reparam and trains and not config.reparam_residual:
                start.zero_()
            states: PrefixTensors = getattr(self, f"prefix_ext_{kind}")
            if has_reparam or not trains:
                states.keep(adapter_name, start)
            else:
                states[adapter_name] = nn.Parameter(start)
            if num_frozen:
                getattr(self, f"prefix_ext_frozen_{kind}").keep(adapter_name, state[:, :num_frozen].clone())
        if has_reparam or not trains:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def materialize(self, adapter_name: str, residual: LayerKV | None, dropout: PrefixDropout | None = None) -> LayerKV:
        """Returns the K/V of the adapter, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

        Dropout is for what trains. Where heads are spread over processes, these are this one's.
        """
        trains = residual is not None or adapter_name not in self.frozen_peft_weight_names
        states = []
        for number, kind in enumerate(LayerKV._fields):
            state = getattr(self, f"prefix_ext_{kind}")[adapter_name]
            if residual is not None:
                state = state + residual[number].to(state.device)
            if dropout is not None and trains:
                state = dropout(state, f"{self.module_name}.{kind}")
            all_frozen = getattr(self, f"prefix_ext_frozen_{kind}")
            states.append(assemble(all_frozen[adapter_name] if adapter_name in all_frozen else None, state))
        self.check_loaded(adapter_name, states[0])
        return LayerKV(*(state if self.heads is None else self.heads.own(state) for state in states))

    def check_loaded(self, adapter_name: str, key: torch.Tensor) -> None:
        """Raises `ValueError` if an adapter made from the config of a saved one still has no weights of its own.

        `load_state_dict` brings them in the form that they have here. transformers' own loading sets tensor after tensor,
        and knows the form on disk only: K/V that a reparameterization has become part of. A compiled graph cannot look.
        """
        if adapter_name not in self.awaiting_weights or torch.compiler.is_compiling():
            return
        if key.is_meta or key.isnan().all():
            raise ValueError(
                f"Adapter {adapter_name!r} was made from the config of a saved adapter, but its weights were never loaded; "
                "use `PeftModel.from_pretrained` or `load_adapter`, or a fresh `PrefixExtConfig` to train anew."
            )
        if adapter_name in self.runtime.prefix_ext_reparam:
            raise ValueError(
                f"Adapter {adapter_name!r} has a reparameterization, which transformers cannot load to go on training; use "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        self.awaiting_weights.discard(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.awaiting_weights -= {
            name for name in self.awaiting_weights if f"{prefix}prefix_ext_key.{name}" in state_dict
        }

    def copy_adapter_from(self, adapter_name: str, source_adapter: str) -> None:
        super().copy_adapter_from(adapter_name, source_adapter)
        if source_adapter not in self.awaiting_weights:
            self.awaiting_weights.discard(adapter_name)

    def forget(self, adapter_name: str) -> None:
        super().forget(adapter_name)
        self.awaiting_weights.discard(adapter_name)

    def _prefix_of(self, step: PrefixForwardContext, cache: Any) -> LayerKV:
        """Returns the K/V that a batch sees, `[b or none, num_kv_heads, p, head_dim]` each."""
        batch = step.batch

        def stack() -> LayerKV:
            return batch.stack(
                [
                    self.materialize(name, step.residuals[name].get(self.module_name), step.dropout)
                    for name in batch.adapters
                ]
            )

        if batch.adapter_indices is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return batch.pick(stack())
        versions = [
            getattr(self, f"prefix_ext_{kind}")[name]._version for name in batch.adapters for kind in LayerKV._fields
        ]
        return batch.pick(
            memoize_for_decoding(cache, self.module_name, (step.states, versions), step.is_decoding, stack)
        )

    def detach(self) -> None:
        """Takes the hook off the attention module."""
        self._handle.remove()

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        named = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        step = self.runtime.context_of(named.get("position_ids"))
        # A cross-attention need not have a prefix.
        if step is None or step.batch.adapters[0] not in self.prefix_ext_key:
            return None
        self._put_prefix(attention, step, named)
        return (), named

    def _put_prefix(self, attention: Any, step: PrefixForwardContext, named: dict[str, Any]) -> None:
        """Puts the prefix into the arguments of the attention module, `named`."""
        cache = named.get(self._cache_argument)
        kv_length = self._kv_length(step, cache)
        named[self._cache_argument] = self._view(cache, self._prefix_of(step, cache))
        named[self._mask_argument] = self._mask(step, named.get(self._mask_argument), kv_length)

    def _kv_length(self, step: PrefixForwardContext, cache: Cache | None) -> int:
        """Returns the number of real tokens that the attention sees, cached and new."""
        num_new = step.positions.shape[-1]
        return num_new if cache is None else int(cache.get_mask_sizes(num_new, self.index)[0])

    def _view(self, cache: Cache | None, prefix: LayerKV) -> Any:
        return PrefixCacheView(cache, prefix)

    def _mask(self, step: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return step.mask(mask, kv_length, self.sliding_window)


def reachable_arguments(attention: nn.Module) -> tuple[list[str], str, str]:
    """Returns the names of the arguments of an attention module, and which of them are the cache and the mask.

    Raises:
        ValueError: If it has no cache or no mask to put a prefix into.
    """
    arguments = list(inspect.signature(attention.forward).parameters)
    cache_name = cache_argument(attention)
    mask_argument = next((name for name in MASK_ARGUMENTS if name in arguments), None)
    if cache_name is None or mask_argument is None:
        raise ValueError(
            f"{describe(attention)} takes no cache or no attention mask, which PREFIX_EXT does not support."
        )
    return arguments, cache_name, mask_argument


def assemble(frozen: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Returns `[num_kv_heads, num_virtual_tokens, head_dim]` from its frozen and its other tokens."""
    return state if frozen is None else torch.cat([frozen, state], dim=1)
