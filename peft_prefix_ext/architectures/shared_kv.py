"""Attention layers without K/V of their own, which attend to those of an earlier layer (Gemma 3n, Gemma 4).

What they are handed has the prefix before it already: it is what the cache's view returned to the earlier layer. Only their
masks lack its columns.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer


class SharedKVLayer:
    """The hook on an attention layer that shares the K/V of another.

    Args:
        attention: The attention module.
        owner: What is known of the layer whose K/V it attends to.
        runtime: What all layers of the model share.
    """

    def __init__(self, attention: nn.Module, owner: ProbedLayer, runtime: PrefixDecoderHook) -> None:
        self.sliding_window = owner.sliding_window
        self.runtime = runtime
        self._handle = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def detach(self) -> None:
        """Takes the hook off the attention module."""
        self._handle.remove()

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        step = self.runtime.context_of(kwargs.get("position_ids"))
        if step is None:
            return None
        num_new, num_queries = step.positions.shape[-1], (args[0] if args else kwargs["hidden_states"]).shape[1]
        if num_queries < num_new:
            # As no K/V are made here, transformers (5.24) leaves out queries whose logits nobody asks for.
            return args, {**kwargs, "attention_mask": step.mask_of_last(num_queries, self.sliding_window)}
        # The owner extended the same mask before; the length of its K/V counts only where there is no cache.
        return args, {**kwargs, "attention_mask": step.mask(kwargs["attention_mask"], num_new, self.sliding_window)}


def find_shared(model: nn.Module, layers: dict[str, ProbedLayer]) -> list[tuple[nn.Module, ProbedLayer]]:
    """Returns the attention modules of `model` that share K/V, each with the last of `layers` of its type.

    The layers are by module name, in order of their index.
    """
    shared = [module for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]
    if not shared:
        return []
    owners = {_layer_type(model.get_submodule(name)): layer for name, layer in layers.items()}
    return [(module, owners[_layer_type(module)]) for module in shared]


def at_work_in(model: nn.Module) -> set[nn.Module]:
    """Returns the modules of `model` that have the hook of a prefix."""
    ours = (PrefixTunerLayer, SharedKVLayer)
    return {
        module
        for module in model.modules()
        if any(isinstance(getattr(hook, "__self__", None), ours) for hook in module._forward_pre_hooks.values())
    }


def _layer_type(attention: Any) -> str:
    return attention.config.layer_types[attention.layer_idx]
