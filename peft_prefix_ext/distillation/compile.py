"""The exact prefix of a context, without training: the model answers as if the text stood in the prompt."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.checkpoint.writer import check_place
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.tuner.state_support import check_prefix_can_be_text


def compile_context(model: PreTrainedModel, context: Context, folder: str | Path) -> PrefixCheckpoint:
    """Writes the prefix of a context, which a frozen model computes in one pass.

    Tokens, log-probabilities and positions behind it are those behind the text itself. Load the model in float32 for
    exactness. `model` is left as it was.

    Args:
        model: The base model.
        context: What stands before every request, from `text_context` or `chat_context`.
        folder: The folder of the new adapter.

    Raises:
        ValueError: If the model cannot have a prefix of this length, or one that acts like the text: an encoder-decoder model,
            and hybrids with Mamba-1.
    """
    check_place(folder, ["PREFIX_EXT"])
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{describe(model)} reads its text in an encoder, where no prefix can stand for it: train a prefix instead."
        )
    check_prefix_can_be_text(model)
    p = len(context.token_ids)
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=p,
        init="tokens",
        init_token_ids=context.token_ids,
        reparam="none",
        context=context.record(),
    )
    prefixed = get_peft_model(model, config)
    try:
        prefixed.save_pretrained(str(folder))
    finally:
        prefixed.unload()
    return read_prefix(folder)
