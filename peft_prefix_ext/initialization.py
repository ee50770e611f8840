"""Where a prefix starts."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedModel

from peft_prefix_ext.checkpoint import LayerKV
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.geometry import RecordedLayer, record_layers


def initial_kv(config: PrefixExtConfig, model: PreTrainedModel, layers: list[RecordedLayer]) -> list[LayerKV]:
    """Returns the initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

    Raises:
        ValueError: If the text has no tokens or its tokenizer cannot be loaded.
    """
    if config.init == "text" and not config.is_saved:
        return [layer.kv for layer in record_layers(model, text_token_ids(config, model))]
    return [
        LayerKV(
            *(
                _start(config, state, shape)
                for state, shape in zip(layer.kv, layer.shapes(config.num_virtual_tokens), strict=True)
            )
        )
        for layer in layers
    ]


def _start(config: PrefixExtConfig, like: torch.Tensor, shape: list[int]) -> torch.Tensor:
    # The weights of a saved adapter are about to be loaded, which must not move the random state.
    start = like.new_zeros(shape)
    return start if config.is_saved else start.normal_(std=config.init_std)


def text_token_ids(config: PrefixExtConfig, model: PreTrainedModel) -> list[int]:
    """Returns the `num_virtual_tokens` token ids of `init_text`.

    The tokenizer's own beginning-of-sequence tokens come first, once (they are the attention sink); a text that is too
    short is repeated, one that is too long is cut.
    """
    source = config.tokenizer_name_or_path or model.name_or_path
    if not source:
        raise ValueError("`tokenizer_name_or_path` must be given: the base model does not say where it came from.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer for `init_text` at {source!r}; give `tokenizer_name_or_path`.") from error
    words = tokenizer(config.init_text, add_special_tokens=False).input_ids
    if not words:
        raise ValueError(f"`init_text` must have at least one token, got {config.init_text!r}.")
    start = tokenizer(config.init_text).input_ids[0]
    begin = [start] if start == tokenizer.bos_token_id and start != words[0] else []
    repeats = -(-config.num_virtual_tokens // len(words))
    return (begin + words * repeats)[: config.num_virtual_tokens]
