"""The exact prefix of a context, without training: the model answers as if the text stood in the prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import PreTrainedModel

from peft_prefix_ext.checkpoint.atomic_save import replacing
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.checkpoint.writer import check_place
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.distillation.chat_template import CHAT_TEMPLATE_NAME
from peft_prefix_ext.distillation.context import Context


def compile_context(model: PreTrainedModel, context: Context, folder: str | Path) -> PrefixCheckpoint:
    """Writes the prefix of a context, which a frozen model computes in one pass.

    Tokens, log-probabilities and positions behind it are those behind the text itself. Load the model in float32 for
    exactness. `model` is left as it was.

    Args:
        model: The base model.
        context: What stands before every request, from `text_context` or `chat_context`.
        folder: The folder of the new adapter. A chat's adapter also holds its chat template, `CHAT_TEMPLATE_NAME`.

    Raises:
        ValueError: If the model cannot have a prefix of this length.
    """
    check_place(folder, ["PREFIX_EXT"])
    p = len(context.token_ids)
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=p,
        init="tokens",
        init_token_ids=context.token_ids,
        reparam="none",
        context=_record(context),
    )
    prefixed = get_peft_model(model, config)
    try:
        with replacing(Path(folder)) as new:
            prefixed.save_pretrained(str(new))
            if context.chat_template is not None:
                (new / CHAT_TEMPLATE_NAME).write_text(context.chat_template, encoding="utf-8")
    finally:
        prefixed.unload()
    if context.chat_template is None:
        Path(folder, CHAT_TEMPLATE_NAME).unlink(missing_ok=True)  # of the adapter that was replaced
    return read_prefix(folder)


def _record(context: Context) -> dict[str, Any]:
    template = context.chat_template
    return {
        "sources": context.sources,
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }
