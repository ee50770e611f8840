"""What is settled about an adapter before the model is touched: where it goes, and what it starts as."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.architectures.encoder_decoder import find_position_embedding
from peft_prefix_ext.architectures.shared_kv import find_shared_kv_layers
from peft_prefix_ext.base_model.layers import ProbedLayer, probe_layers
from peft_prefix_ext.base_model.tensor_parallel import broadcast_to_tensor_parallel
from peft_prefix_ext.checkpoint.compatibility import check_saved_adapter, warn_of_other_base_name
from peft_prefix_ext.checkpoint.format import DECODER, LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization import initial_kv
from peft_prefix_ext.injection.decoder_hook import without_prefixes
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
    record,
)
from peft_prefix_ext.tuner.self_test import check_prefix_matches_text


@dataclass(frozen=True)
class InjectionPlan:
    """Where one adapter goes.

    Args:
        stacks: The names of the stacks (the decoder, and the encoder if any) by kind of attention.
        layers: The attention layers by module name.
        initial: The K/V that each of them starts at, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
        mlps: The reparameterization of each stack, by its name; `None` without one.
    """

    stacks: dict[str, str]
    layers: dict[str, ProbedLayer]
    initial: dict[str, LayerKV]
    mlps: dict[str, PrefixMLP | None]


def make_injection_plan(config: PrefixExtConfig, model: PreTrainedModel) -> InjectionPlan:
    """Finds the attention layers and the initial K/V; `config` learns what is recorded of them.

    Raises:
        ValueError: If the model has no place for this prefix, or is not the one that it was trained on.
    """
    with without_prefixes(model):
        recorded = [layer for layer in probe_layers(model) if layer.attention in config.attentions]
        check_attentions(config, model, recorded)
        check_length(config, model)
        config._recorded = record(config, model, recorded)
        check_saved_adapter(config, model, config._recorded["prefix_layers"])
        warn_of_other_base_name(config, model)
        warn_of_other_adapters(config, model)
        check_layers_to_train(config, recorded)
        check_modules_to_save(config.modules_to_save, model, _at_work(model, recorded))
        for layer in recorded:
            attention_arguments(model.get_submodule(layer.module))
        if not model.config.is_encoder_decoder and not _has_prefix(model):
            check_prefix_matches_text(model, model.get_submodule(find_decoder(model, recorded, DECODER)))
        initial, config.init_report = initial_kv(config, model, recorded)
    broadcast_to_tensor_parallel(model, *(state for kv in initial for state in kv))
    config.forget_sources()  # a model is copied and pickled without them
    stacks = {attention: find_decoder(model, recorded, attention) for attention in config.attentions}
    mlps = {}
    for stack in dict.fromkeys(stacks.values()):
        inside = [number for number, layer in enumerate(recorded) if stacks[layer.attention] == stack]
        mlps[stack] = create_reparam(config, [recorded[n] for n in inside], [initial[n] for n in inside])
        broadcast_to_tensor_parallel(model, *(mlp.parameters() if (mlp := mlps[stack]) is not None else ()))
    return InjectionPlan(
        stacks,
        {layer.module: layer for layer in recorded},
        {layer.module: kv for layer, kv in zip(recorded, initial, strict=True)},
        mlps,
    )


def _at_work(model: PreTrainedModel, layers: list[ProbedLayer]) -> set[nn.Module]:
    """Returns the modules that the prefixes of `layers` will have hooks on."""
    stacks = {model.get_submodule(find_decoder(model, layers, layer.attention)) for layer in layers}
    embeddings = {embedding for stack in stacks if (embedding := find_position_embedding(stack)) is not None}
    shared = {module for module, _ in find_shared_kv_layers(model, {layer.module: layer for layer in layers})}
    return {model.get_submodule(layer.module) for layer in layers} | stacks | embeddings | shared


def _has_prefix(model: nn.Module) -> bool:
    return any(isinstance(module, PrefixTunerLayer) for module in model.modules())
