"""What is decided about an adapter before the model changes: where its prefixes go and what they start as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.encoder_decoder import PrefixStackHook, find_position_embedding
from peft_prefix_ext.architectures.shared_kv import SharedKVLayer, find_shared_kv_layers
from peft_prefix_ext.base_model.attention_implementation import attention_implementation
from peft_prefix_ext.base_model.layers import ProbedLayer, probe_layers
from peft_prefix_ext.base_model.tensor_parallel import broadcast_to_tensor_parallel
from peft_prefix_ext.checkpoint.format import DECODER, LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization import initial_kv
from peft_prefix_ext.injection.caller_positions import enclosing_models
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook, without_prefixes
from peft_prefix_ext.injection.layer import attention_arguments
from peft_prefix_ext.injection.reparam import PrefixMLP, create_reparam
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer
from peft_prefix_ext.tuner.other_adapters import warn_of_other_adapters
from peft_prefix_ext.tuner.requirements import (
    check_attentions,
    check_layers_to_train,
    check_length,
    check_modules_to_save,
    find_decoder,
    model_record,
)
from peft_prefix_ext.tuner.saved_adapters import check_saved_adapter, warn_of_other_base_name
from peft_prefix_ext.tuner.self_test import check_decoder_matches_text, check_prefix_matches_text


@dataclass(frozen=True)
class InjectionPlan:
    """Where the prefixes of one adapter go.

    Args:
        stacks: The module names of the stacks (the decoder, and the encoder if any) by kind of attention.
        layers: The attention layers by module name.
        initial: The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, by module name.
        mlps: The reparameterization of each stack by its module name; `None` without one.
    """

    stacks: dict[str, str]
    layers: dict[str, ProbedLayer]
    initial: dict[str, LayerKV]
    mlps: dict[str, PrefixMLP | None]


def make_injection_plan(config: PrefixExtConfig, model: PreTrainedModel) -> InjectionPlan:
    """Finds the attention layers and the initial K/V, and records in `config` what is saved about the model.

    Raises:
        ValueError: If the model cannot have this prefix, or is not the one that a saved prefix was trained on.
    """
    with without_prefixes(model):
        probed = [layer for layer in probe_layers(model) if layer.attention in config.attentions]
        check_attentions(config, model, probed)
        check_length(config, model)
        config._saved_fields = model_record(config, model, probed)
        check_saved_adapter(config, model, config._saved_fields["prefix_layers"])
        warn_of_other_base_name(config, model)
        warn_of_other_adapters(config, model)
        check_layers_to_train(config, probed)
        check_modules_to_save(config.modules_to_save, model, _hooked_modules(model, probed))
        for layer in probed:
            attention_arguments(model.get_submodule(layer.module))
        if not model.config.is_encoder_decoder and not _has_prefix(model):
            check_prefix_matches_text(model, model.get_submodule(find_decoder(model, probed, DECODER)))
        initial, config.init_report = initial_kv(config, model, probed)
    broadcast_to_tensor_parallel(model, *(state for kv in initial for state in kv))
    config.forget_sources()  # so that the model is copied and pickled without them
    stacks = {attention: find_decoder(model, probed, attention) for attention in config.attentions}
    mlps = {}
    for stack in dict.fromkeys(stacks.values()):
        inside = [number for number, layer in enumerate(probed) if stacks[layer.attention] == stack]
        mlps[stack] = create_reparam(config, [probed[n] for n in inside], [initial[n] for n in inside])
        broadcast_to_tensor_parallel(model, *(mlp.parameters() if (mlp := mlps[stack]) is not None else ()))
    return InjectionPlan(
        stacks,
        {layer.module: layer for layer in probed},
        {layer.module: kv for layer, kv in zip(probed, initial, strict=True)},
        mlps,
    )


def create_hook(model: PreTrainedModel, stack: Any, plan: InjectionPlan) -> PrefixDecoderHook:
    """Creates the hook of a stack of `model`, without any adapter."""
    hook_class = PrefixStackHook if model.config.is_encoder_decoder else PrefixDecoderHook
    hook = hook_class(stack, enclosing_models(stack, model))
    hook.tested_attention.add(attention_implementation(stack.config))  # when the plan was made
    if not model.config.is_encoder_decoder:
        hook.test_attention = check_decoder_matches_text
    hook.device = next(iter(plan.layers.values())).kv.key.device  # not that of the weights, which may be offloaded
    hook.shared_kv_layers = [
        SharedKVLayer(module, owner, hook) for module, owner in find_shared_kv_layers(model, plan.layers)
    ]
    return hook


def _hooked_modules(model: PreTrainedModel, layers: list[ProbedLayer]) -> set[nn.Module]:
    """Returns the modules that the prefixes of `layers` will have hooks on."""
    stacks = {model.get_submodule(find_decoder(model, layers, layer.attention)) for layer in layers}
    embeddings = {embedding for stack in stacks if (embedding := find_position_embedding(stack)) is not None}
    shared = {module for module, _ in find_shared_kv_layers(model, {layer.module: layer for layer in layers})}
    return {model.get_submodule(layer.module) for layer in layers} | stacks | embeddings | shared


def _has_prefix(model: nn.Module) -> bool:
    return any(isinstance(module, PrefixTunerLayer) for module in model.modules())
