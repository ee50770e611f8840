"""The token ids of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.generation.generator import TokenIds


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], chat_template: str | None = None
) -> TokenIds:
    """Returns the tokens of a chat up to the start of the answer.

    Args:
        tokenizer: The tokenizer.
        messages: The messages.
        chat_template: The template of a context, behind which the messages stand; the tokenizer's own by default.

    Raises:
        ValueError: If the template rejects the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"The chat template does not take the message {messages[-1]['content']!r} ({error}); change or remove it."
        ) from error
    return list(tokenizer(str(text), add_special_tokens=False).input_ids)
