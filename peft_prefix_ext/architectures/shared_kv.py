"""Attention layers without K/V of their own, which attend to those of an earlier layer (Gemma 3n, Gemma 4).

The K/V they get include the prefix: they are what the cache view returned to the earlier layer. Only their masks need
columns for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.forward_context import PrefixForwardContext
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer


class SharedKVLayer:
    """The hook on an attention layer that shares the K/V of another layer.

    Args:
        attention: The attention module.
        owner: The layer whose K/V it attends to.
        decoder_hook: The hook on the decoder.
    """

    def __init__(self, attention: nn.Module, owner: ProbedLayer, decoder_hook: PrefixDecoderHook) -> None:
        self.sliding_window = owner.sliding_window
        self.decoder_hook = decoder_hook
        self._handle = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def detach(self) -> None:
        """Removes the hook from the attention module."""
        self._handle.remove()

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        context = self.decoder_hook.find_context(kwargs.get("position_ids"))
        if context is None:
            return None
        num_queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if num_queries < context.num_new_tokens:
            # transformers (5.24) skips queries whose logits are not needed, as no K/V are made here.
            mask = last_queries_mask(context, num_queries, self.sliding_window)
        else:
            # Usually the mask that the owner extended; the length counts only where there is neither mask nor cache.
            mask = context.mask(kwargs["attention_mask"], context.num_new_tokens, self.sliding_window)
        return args, {**kwargs, "attention_mask": mask}


def last_queries_mask(context: PrefixForwardContext, num_queries: int, sliding_window: int | None) -> Any:
    """Returns the rows of the last queries in the mask of an earlier layer with the same window.

    Raises:
        ValueError: If that is flex attention's mask, which has no rows to select.
    """
    mask = context.earlier_mask(sliding_window)
    if isinstance(mask, BlockMask):
        raise ValueError(
            "Layers that share K/V are not supported with a prefix under flex attention; load the model with "
            "attn_implementation='sdpa'."
        )
    has_rows = mask is not None and mask.dim() == 4
    return mask[:, :, -num_queries:] if has_rows else mask


def find_shared_kv_layers(model: nn.Module, layers: dict[str, ProbedLayer]) -> list[tuple[nn.Module, ProbedLayer]]:
    """Returns the attention modules of `model` that share K/V, each with the layer that owns them.

    Args:
        model: The model.
        layers: Its layers with K/V of their own, by module name, in order of their index. The last one of each layer type
            shares its K/V.
    """
    shared = [module for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]
    if not shared:
        return []
    owners = {_layer_type(model.get_submodule(name)): layer for name, layer in layers.items()}
    return [(module, owners[_layer_type(module)]) for module in shared]


def hooked_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules of `model` that a prefix has a hook on."""
    ours = (PrefixTunerLayer, SharedKVLayer)
    return {
        module
        for module in model.modules()
        if any(isinstance(getattr(hook, "__self__", None), ours) for hook in module._forward_pre_hooks.values())
    }


def _layer_type(attention: Any) -> str:
    return attention.config.layer_types[attention.layer_idx]
