"""Where a prefix starts: one module for each kind of source."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.geometry import RecordedLayer, record_layers
from peft_prefix_ext.initialization.exemplars import exemplar_tokens
from peft_prefix_ext.initialization.tokens import text_tokens


class Initial(NamedTuple):
    """The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each, and where they come from."""

    layers: list[LayerKV]
    report: str | None


# By prefill: the K/V of these tokens, as the frozen base writes them, in layers of every kind.
PREFILLED = {"text": text_tokens, "exemplars": exemplar_tokens}


def initial_kv(config: PrefixExtConfig, model: PreTrainedModel, layers: list[RecordedLayer]) -> Initial:
    """Returns where the prefix of `config` starts, for `layers` of `model`; zeros where its weights are yet to be loaded.

    Raises:
        ValueError: If the source of the K/V is missing, malformed or does not fit the model.
    """
    if config.is_saved:
        # The weights of a saved adapter are about to be loaded, which must not move the random state.
        return Initial([_new(config, layer) for layer in layers], config.init_report)
    report = f"{config.num_virtual_tokens} virtual tokens: "
    if config.init in PREFILLED:
        tokens = PREFILLED[config.init](config, model)
        return Initial([layer.kv for layer in record_layers(model, tokens.ids)], report + tokens.report)
    started = [_new(config, layer) for layer in layers]
    for kv in started:
        for state in kv:
            state.normal_(std=config.init_std)
    return Initial(started, f"{report}random K/V of standard deviation {config.init_std}")


def _new(config: PrefixExtConfig, layer: RecordedLayer) -> LayerKV:
    shapes = layer.shapes(config.num_virtual_tokens)
    return LayerKV(*(torch.zeros_like(state.new_empty(shape)) for state, shape in zip(layer.kv, shapes, strict=True)))
