"""`PrefixExtLayer`: the prefixes of one attention module, and the hook that puts them into its arguments."""

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
from peft_prefix_ext.injection.tuner_layer import PrefixWeightsLayer

MASK_ARGUMENTS = ("attention_mask", "mask")


class PrefixExtLayer(PrefixWeightsLayer):
    """A child of an attention module that acts in a hook before its forward, so that base parameters keep their names.

    The hook runs inside the checkpointed region, where there is no cache.

    Args:
        attention: The attention module.
        probed: What the probe found of it.
        decoder_hook: The hook on the decoder, which all layers share.
    """

    adapter_layer_names = ("prefix_ext_key", "prefix_ext_value")
    other_param_names = ("prefix_ext_frozen_key", "prefix_ext_frozen_value")

    def __init__(self, attention: nn.Module, probed: ProbedLayer, decoder_hook: PrefixDecoderHook) -> None:
        super().__init__(probed.kv.key.device, probed.module, probed.index, decoder_hook)
        self.prefix_ext_key = PrefixTensors(attention)
        self.prefix_ext_value = PrefixTensors(attention)
        self.prefix_ext_frozen_key = PrefixTensors(attention)
        self.prefix_ext_frozen_value = PrefixTensors(attention)
        self.attention = probed.attention
        self.sliding_window = probed.sliding_window
        self.heads = probed.heads
        self._parameter_names, self._cache_argument, self._mask_argument = attention_arguments(attention)
        self._handle = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def update_layer(self, adapter_name: str, initial: LayerKV, config: PrefixExtConfig, has_reparam: bool) -> None:
        """Adds an adapter that starts at `initial`.

        Args:
            adapter_name: The name of the adapter.
            initial: Its initial K/V, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
            config: Its config.
            has_reparam: Whether it has a reparameterization. Then the K/V are frozen: the initial ones if the MLP's output
                is added to them, zeros if it replaces them.
        """
        num_frozen = 0 if config.inference_mode else config.num_frozen_tokens
        trains = config.trains(self.index)
        for kind, tensor in zip(initial._fields, initial, strict=True):
            start = tensor[:, num_frozen:].clone()
            if has_reparam and trains and not config.reparam_residual:
                start.zero_()
            container: PrefixTensors = getattr(self, f"prefix_ext_{kind}")
            if has_reparam or not trains:
                container.register_frozen(adapter_name, start)
            else:
                container[adapter_name] = nn.Parameter(start)
            if num_frozen:
                frozen: PrefixTensors = getattr(self, f"prefix_ext_frozen_{kind}")
                frozen.register_frozen(adapter_name, tensor[:, :num_frozen].clone())
        if has_reparam or not trains:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def materialize(self, adapter_name: str, residual: LayerKV | None, dropout: PrefixDropout | None = None) -> LayerKV:
        """Returns the K/V of an adapter, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

        In a tensor-parallel model these are the local heads.

        Args:
            adapter_name: The name of the adapter.
            residual: The output of its reparameterization for this layer, or `None`.
            dropout: The dropout of the tokens that train, or `None`.
        """
        trains = residual is not None or adapter_name not in self.frozen_peft_weight_names
        kv = []
        for number, kind in enumerate(LayerKV._fields):
            tensor = getattr(self, f"prefix_ext_{kind}")[adapter_name]
            if residual is not None:
                tensor = tensor + residual[number].to(tensor.device)
            if dropout is not None and trains:
                tensor = dropout(tensor, f"{self.module_name}.{kind}")
            frozen = getattr(self, f"prefix_ext_frozen_{kind}")
            kv.append(join_frozen(frozen[adapter_name] if adapter_name in frozen else None, tensor))
        self.check_loaded(adapter_name, kv[0])
        return LayerKV(*(tensor if self.heads is None else self.heads.local(tensor) for tensor in kv))

    def detach(self) -> None:
        """Removes the hook from the attention module."""
        self._handle.remove()

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        arguments = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        context = self.decoder_hook.find_context(arguments.get("position_ids"))
        # A cross-attention may have no prefix.
        if context is None or context.batch.adapters[0] not in self.prefix_ext_key:
            return None
        self._put_prefix(attention, context, arguments)
        return (), arguments

    def _put_prefix(self, attention: Any, context: PrefixForwardContext, arguments: dict[str, Any]) -> None:
        """Puts the prefix into the `arguments` of the attention module: the cache and the mask."""
        cache = arguments.get(self._cache_argument)
        kv_length = self._kv_length(context, cache)
        arguments[self._cache_argument] = self._cache_view(cache, self._batch_prefix(context, cache))
        arguments[self._mask_argument] = self._mask(context, arguments.get(self._mask_argument), kv_length)

    def _batch_prefix(self, context: PrefixForwardContext, cache: Any) -> LayerKV:
        """Returns the K/V that the rows of the batch see, `[b or none, num_kv_heads, p, head_dim]` each."""
        batch = context.batch

        def stack() -> LayerKV:
            return batch.stack(
                [
                    self.materialize(name, context.residuals[name].get(self.module_name), context.dropout)
                    for name in batch.adapters
                ]
            )

        if batch.adapter_indices is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return batch.select_rows(stack())
        versions = [
            getattr(self, f"prefix_ext_{kind}")[name]._version for name in batch.adapters for kind in LayerKV._fields
        ]
        state = (context.reparam_state, versions)
        return batch.select_rows(memoize_for_decoding(cache, self.module_name, state, context.is_decoding, stack))

    def _kv_length(self, context: PrefixForwardContext, cache: Cache | None) -> int:
        """Returns the number of real tokens that the attention sees, cached and new."""
        num_new = context.num_new_tokens
        return num_new if cache is None else int(cache.get_mask_sizes(num_new, self.index)[0])

    def _cache_view(self, cache: Cache | None, prefix: LayerKV) -> Any:
        return PrefixCacheView(cache, prefix)

    def _mask(self, context: PrefixForwardContext, mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        return context.mask(mask, kv_length, self.sliding_window)


def attention_arguments(attention: nn.Module) -> tuple[list[str], str, str]:
    """Returns the parameters of an attention module's forward, and the names of the cache and the mask among them.

    Raises:
        ValueError: If it takes no cache or no mask.
    """
    parameters = list(inspect.signature(attention.forward).parameters)
    cache_name = cache_argument(attention)
    mask_name = next((name for name in MASK_ARGUMENTS if name in parameters), None)
    if cache_name is None or mask_name is None:
        raise ValueError(
            f"{describe(attention)} takes no cache or no attention mask, which PREFIX_EXT does not support."
        )
    return parameters, cache_name, mask_name


def join_frozen(frozen: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Returns `[num_kv_heads, num_virtual_tokens, head_dim]` from the frozen tokens, if any, and the others."""
    return other if frozen is None else torch.cat([frozen, other], dim=1)
