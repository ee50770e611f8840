"""Where a prefix starts: one module for each kind of source."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedLayer, record_layers
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization.adapters import kv_from_adapters
from peft_prefix_ext.initialization.exemplars import exemplar_tokens
from peft_prefix_ext.initialization.past_key_values import kv_from_past_key_values
from peft_prefix_ext.initialization.tokens import given_tokens, text_tokens, vocabulary_tokens
from peft_prefix_ext.sources import check_sources


class Initial(NamedTuple):
    """The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, and where they come from."""

    layers: list[LayerKV]
    report: str | None


# By prefill: the K/V of these tokens, as the frozen base writes them, in layers of every kind.
PREFILLED = {
    "vocab": vocabulary_tokens,
    "tokens": given_tokens,
    "text": text_tokens,
    "exemplars": exemplar_tokens,
}


def initial_kv(config: PrefixExtConfig, model: PreTrainedModel, layers: list[ProbedLayer]) -> Initial:
    """Returns where the prefix of `config` starts, for `layers` of `model`.

    NaN where its weights are yet to be loaded.

    Raises:
        ValueError: If the source of the K/V is missing, malformed or does not fit the model.
    """
    if config.is_saved:
        # The weights of a saved adapter are about to be loaded, which must not move the random state.
        return Initial([_new(config, layer, float("nan")) for layer in layers], config.init_report)
    check_sources(config)
    if config.init in PREFILLED:
        tokens = PREFILLED[config.init](config, model)
        recorded = {layer.module: layer.kv for layer in record_layers(model, tokens.ids)}
        initial, source = [recorded[layer.module] for layer in layers], tokens.report
    elif config.init == "kv":
        initial, source = kv_from_past_key_values(config, layers), "given K/V"
    elif config.init in ("adapter", "average"):
        initial, source = kv_from_adapters(config, model, layers)
    else:
        initial = [_new(config, layer) for layer in layers]
        source = f"random K/V of standard deviation {config.init_std}"
        for kv in initial:
            for state in kv:
                state.normal_(std=config.init_std)
    p = config.num_virtual_tokens
    return Initial(initial, f"{p} virtual token{'s' if p > 1 else ''}: {source}")


def _new(config: PrefixExtConfig, layer: ProbedLayer, value: float = 0.0) -> LayerKV:
    shapes = layer.shapes(config.num_virtual_tokens)
    return LayerKV(*(state.new_full(shape, value) for state, shape in zip(layer.kv, shapes, strict=True)))
