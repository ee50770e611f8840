"""What is decided about an adapter before the model changes: where its prefixes go and what they start as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.encoder_decoder import LAYER_CLASSES, PrefixStackHook, find_position_embedding
from peft_prefix_ext.architectures.select import select_layer_class
from peft_prefix_ext.architectures.shared_kv import SharedKVLayer, find_shared_kv_layers
from peft_prefix_ext.base_model.attention_implementation import attention_implementation
from peft_prefix_ext.base_model.layers import ProbedLayer, ProbedModel, probe_model
from peft_prefix_ext.base_model.states import ProbedState
from peft_prefix_ext.base_model.tensor_parallel import broadcast_to_tensor_parallel
from peft_prefix_ext.checkpoint.format import DECODER, LayerKV, LayerState
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization import initial_kv
from peft_prefix_ext.injection.caller_positions import enclosing_models
from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook, without_prefixes
from peft_prefix_ext.injection.layer import attention_arguments
from peft_prefix_ext.injection.reparam import PrefixMLP, create_reparam
from peft_prefix_ext.injection.state_layer import PrefixStateLayer
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer, PrefixWeightsLayer
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
from peft_prefix_ext.tuner.state_support import trainable_states


@dataclass(frozen=True)
class InjectionPlan:
    """Where the prefixes of one adapter go.

    Args:
        stacks: The module names of the stacks (the decoder, and the encoder if any) by kind of attention.
        layers: The attention layers by module name.
        states: The recurrent layers by module name; empty if they have no prefix.
        initial: The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, by module name.
        initial_states: The initial states of each recurrent layer, by module name.
        mlps: The reparameterization of each stack by its module name; `None` without one.
    """

    stacks: dict[str, str]
    layers: dict[str, ProbedLayer]
    states: dict[str, ProbedState]
    initial: dict[str, LayerKV]
    initial_states: dict[str, LayerState]
    mlps: dict[str, PrefixMLP | None]


def make_injection_plan(config: PrefixExtConfig, model: PreTrainedModel) -> InjectionPlan:
    """Finds the layers with a prefix and what they start from, and records in `config` what is saved about the model.

    Raises:
        ValueError: If the model cannot have this prefix, or is not the one that a saved prefix was trained on.
    """
    with without_prefixes(model):
        found = probe_model(model)
        layers = [layer for layer in found.layers if layer.attention in config.attentions]
        probed = ProbedModel(layers, trainable_states(config, model, found))
        check_attentions(config, model, layers)
        check_length(config, model)
        config._saved_fields = model_record(config, model, probed)
        check_saved_adapter(config, model, config._saved_fields)
        warn_of_other_base_name(config, model)
        warn_of_other_adapters(config, model)
        check_layers_to_train(config, probed)
        check_modules_to_save(config.modules_to_save, model, _hooked_modules(model, probed))
        for layer in layers:
            attention_arguments(model.get_submodule(layer.module))
        if not model.config.is_encoder_decoder and not _has_prefix(model, with_states=bool(probed.states)):
            decoder = model.get_submodule(find_decoder(model, probed, DECODER))
            check_prefix_matches_text(model, decoder, with_states=bool(probed.states))
        initial, initial_states, config.init_report = initial_kv(config, model, probed)
    broadcast_to_tensor_parallel(model, *(tensor for kv in initial for tensor in kv))
    broadcast_to_tensor_parallel(model, *(tensor for states in initial_states for _, _, tensor in states.numbered()))
    config.forget_sources()  # so that the model is copied and pickled without them
    stacks = {attention: find_decoder(model, probed, attention) for attention in config.attentions}
    mlps = {}
    for stack in dict.fromkeys(stacks.values()):
        inside = [number for number, layer in enumerate(layers) if stacks[layer.attention] == stack]
        mlps[stack] = create_reparam(config, [layers[n] for n in inside], [initial[n] for n in inside])
        broadcast_to_tensor_parallel(model, *(mlp.parameters() if (mlp := mlps[stack]) is not None else ()))
    return InjectionPlan(
        stacks,
        {layer.module: layer for layer in layers},
        {each.module: each for each in probed.states},
        {layer.module: kv for layer, kv in zip(layers, initial, strict=True)},
        {each.module: states for each, states in zip(probed.states, initial_states, strict=True)},
        mlps,
    )


def create_hook(model: PreTrainedModel, stack: Any, plan: InjectionPlan) -> PrefixDecoderHook:
    """Creates the hook of a stack of `model`, without any adapter."""
    hook_class = PrefixStackHook if model.config.is_encoder_decoder else PrefixDecoderHook
    hook = hook_class(stack, enclosing_models(stack, model))
    hook.tested_attention.add(attention_implementation(stack.config))  # when the plan was made
    if not model.config.is_encoder_decoder:
        hook.test_attention = check_decoder_matches_text
    hook.device = _first_device(plan)  # not that of the weights, which may be offloaded
    hook.shared_kv_layers = [
        SharedKVLayer(module, owner, hook) for module, owner in find_shared_kv_layers(model, plan.layers)
    ]
    return hook


def create_layer(
    module: nn.Module, parent: nn.Module, name: str, plan: InjectionPlan, hook: PrefixDecoderHook
) -> PrefixWeightsLayer:
    """Creates the layer of an attention module or a mixer, without any adapter.

    Args:
        module: The module.
        parent: The module that it is a child of.
        name: Its name in the model.
        plan: The plan that it is part of.
        hook: The hook of its stack.
    """
    if name in plan.states:
        return PrefixStateLayer(module, parent, plan.states[name], hook)
    probed = plan.layers[name]
    is_encoder_decoder = isinstance(hook, PrefixStackHook)
    kind = LAYER_CLASSES[probed.attention] if is_encoder_decoder else select_layer_class(module, probed)
    return kind(module, probed, hook)


def _first_device(plan: InjectionPlan) -> torch.device:
    tensors = [layer.kv.key for layer in plan.layers.values()]
    tensors += [tensor for each in plan.states.values() for _, _, tensor in each.states.numbered()]
    return tensors[0].device


def _hooked_modules(model: PreTrainedModel, probed: ProbedModel) -> set[nn.Module]:
    """Returns the modules that the prefixes of a model will have hooks on."""
    layers = probed.layers
    attentions = {layer.attention for layer in layers} or {DECODER}
    stacks = {model.get_submodule(find_decoder(model, probed, attention)) for attention in attentions}
    embeddings = {embedding for stack in stacks if (embedding := find_position_embedding(stack)) is not None}
    shared = {module for module, _ in find_shared_kv_layers(model, {layer.module: layer for layer in layers})}
    names = [layer.module for layer in layers] + [each.module for each in probed.states]
    return {model.get_submodule(name) for name in names} | stacks | embeddings | shared


def _has_prefix(model: nn.Module, with_states: bool) -> bool:
    """Whether a model has a prefix already, and so was tested; one with states if such a one is asked for."""
    kind = PrefixStateLayer if with_states else PrefixTunerLayer
    return any(isinstance(module, kind) for module in model.modules())
