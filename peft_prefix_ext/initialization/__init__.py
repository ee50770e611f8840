"""The initial K/V of a prefix: one module for each kind of source."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedLayer, record_layers
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig, check_sources
from peft_prefix_ext.initialization.adapters import kv_from_adapters
from peft_prefix_ext.initialization.exemplars import exemplar_tokens
from peft_prefix_ext.initialization.media import refuse_placeholders
from peft_prefix_ext.initialization.past_key_values import kv_from_past_key_values
from peft_prefix_ext.initialization.tokens import listed_tokens, text_tokens, vocabulary_tokens


class Initial(NamedTuple):
    """The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, and a phrase on their source."""

    layers: list[LayerKV]
    report: str | None


# Initializations by prefill: the K/V that the frozen base model writes for these tokens.
TOKEN_SOURCES = {
    "vocab": vocabulary_tokens,
    "tokens": listed_tokens,
    "text": text_tokens,
    "exemplars": exemplar_tokens,
}


def initial_kv(config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]) -> Initial:
    """Returns the initial K/V of a new adapter; NaN if its weights are yet to be loaded.

    Args:
        config: The config of the adapter.
        model: The base model.
        layers: The attention layers that get a prefix.

    Raises:
        ValueError: If the source is missing or malformed, or does not fit the model.
    """
    if config.is_saved:
        # The weights will be loaded, so leave torch's random state alone.
        return Initial([_full(config, layer, float("nan")) for layer in layers], config.init_report)
    check_sources(config)
    if config.init in TOKEN_SOURCES:
        tokens = TOKEN_SOURCES[config.init](config, model)
        refuse_placeholders(tokens.ids, model, config.init)
        prefilled = {layer.module: layer.kv for layer in record_layers(model, tokens.ids)}
        initial, source = [prefilled[layer.module] for layer in layers], tokens.report
    elif config.init == "kv":
        initial, source = kv_from_past_key_values(config, model, layers), "given K/V"
    elif config.init in ("adapter", "average"):
        initial, source = kv_from_adapters(config, model, layers)
    else:
        initial = [_full(config, layer) for layer in layers]
        source = f"random K/V of standard deviation {config.init_std}"
        for kv in initial:
            for tensor in kv:
                tensor.normal_(std=config.init_std)
    p = config.num_virtual_tokens
    return Initial(initial, f"{p} virtual token{'s' if p > 1 else ''}: {source}")


def _full(config: PrefixExtConfig, layer: ProbedLayer, value: float = 0.0) -> LayerKV:
    shapes = layer.shapes(config.num_virtual_tokens)
    return LayerKV(*(tensor.new_full(shape, value) for tensor, shape in zip(layer.kv, shapes, strict=True)))
