"""The initial K/V and states of a prefix: one module for each kind of source."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedLayer, ProbedModel, record
from peft_prefix_ext.base_model.states import map_states
from peft_prefix_ext.checkpoint.format import LayerKV, LayerState
from peft_prefix_ext.config import PrefixExtConfig, check_sources
from peft_prefix_ext.initialization.adapters import read_adapters
from peft_prefix_ext.initialization.exemplars import exemplar_tokens
from peft_prefix_ext.initialization.media import refuse_placeholders
from peft_prefix_ext.initialization.past_key_values import kv_from_past_key_values, states_from_past_key_values
from peft_prefix_ext.initialization.tokens import listed_tokens, text_tokens, vocabulary_tokens


class Initial(NamedTuple):
    """What each layer starts from, and a phrase on its source.

    Args:
        layers: The K/V of each attention layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
        states: The states of each recurrent layer.
        report: The phrase.
    """

    layers: list[LayerKV]
    states: list[LayerState]
    report: str | None


# Initializations by prefill: what the frozen base model keeps of these tokens.
TOKEN_SOURCES = {
    "vocab": vocabulary_tokens,
    "tokens": listed_tokens,
    "text": text_tokens,
    "exemplars": exemplar_tokens,
}


def initial_kv(config: PrefixExtConfig, model: PreTrainedModel, probed: ProbedModel) -> Initial:
    """Returns what a new adapter starts from; NaN if its weights are yet to be loaded.

    Where the source says nothing of states, recurrent layers start at zero as in the base model.

    Args:
        config: The config of the adapter.
        model: The base model.
        probed: The layers that get a prefix.

    Raises:
        ValueError: If the source is missing or malformed, or does not fit the model.
    """
    if config.is_saved:
        # The weights will be loaded, so leave torch's random state alone.
        nan = float("nan")
        unknown = [map_states(each.states, lambda tensor: torch.full_like(tensor, nan)) for each in probed.states]
        return Initial([_full(config, layer, nan) for layer in probed.layers], unknown, config.init_report)
    check_sources(config)
    states: list[LayerState] | None = None
    if config.init in TOKEN_SOURCES:
        tokens = TOKEN_SOURCES[config.init](config, model)
        refuse_placeholders(tokens.ids, model, config.init)
        prefilled = record(model, tokens.ids)
        kv_by_module = {layer.module: layer.kv for layer in prefilled.layers}
        states_by_module = {each.module: each.states for each in prefilled.states}
        initial, source = [kv_by_module[layer.module] for layer in probed.layers], tokens.report
        states = [states_by_module[each.module] for each in probed.states]
    elif config.init == "kv":
        initial, source = kv_from_past_key_values(config, model, probed.layers), "given K/V"
        states = states_from_past_key_values(config, probed.states)
    elif config.init in ("adapter", "average"):
        initial, states, source = read_adapters(config, model, probed)
    else:
        initial = [_full(config, layer) for layer in probed.layers]
        states = [map_states(each.states, torch.zeros_like) for each in probed.states]
        source = f"random K/V of standard deviation {config.init_std}"
        for tensor in (tensor for group in (initial, *states) for each in group for tensor in each):
            tensor.normal_(std=config.init_std)
    if states is None:
        states = [map_states(each.states, torch.zeros_like) for each in probed.states]
        source += ", states of recurrent layers zero" if states else ""
    p = config.num_virtual_tokens
    return Initial(initial, states, f"{p} virtual token{'s' if p > 1 else ''}: {source}")


def _full(config: PrefixExtConfig, layer: ProbedLayer, value: float = 0.0) -> LayerKV:
    shapes = layer.shapes(config.num_virtual_tokens)
    return LayerKV(*(tensor.new_full(shape, value) for tensor, shape in zip(layer.kv, shapes, strict=True)))
