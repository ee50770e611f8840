"""Models that PREFIX_EXT refuses by their config, before it runs them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.attention_implementation import (
    SUPPORTED_IMPLEMENTATIONS,
    attention_implementation,
    uses_flash,
)
from peft_prefix_ext.base_model.describe import describe


def check_supported(model: nn.Module) -> None:
    """Raises `ValueError` for a model whose output would be wrong with a prefix, without an error of its own."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"A prefix needs a transformers `PreTrainedModel`, got {type(model).__name__}.")
    config = model.config.get_text_config(decoder=True)
    name = describe(model)
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise ValueError(f"{name} reads `{model.main_input_name}` and not text, which PREFIX_EXT does not support.")
    implementation = attention_implementation(config)
    if model.config.is_encoder_decoder and not uses_flash(config) and implementation not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"{name} runs attn_implementation={implementation!r}, which PREFIX_EXT cannot test on an encoder-decoder "
            "model; load it with 'sdpa' or 'eager'."
        )
    layer_types = getattr(config, "layer_types", None) or []
    if uses_flash(config) and (getattr(config, "sliding_window", None) or "sliding_attention" in layer_types):
        raise ValueError(f"{name} has sliding windows: load it with attn_implementation='sdpa' for PREFIX_EXT.")
