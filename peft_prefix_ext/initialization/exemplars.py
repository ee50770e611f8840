"""Initial tokens from rows of a dataset (`init_exemplars`), packed one after the other.

A prefix that starts as a few worked examples starts as few-shot prompting, and trains on from there.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.dataset_rows import iter_rows
from peft_prefix_ext.initialization.media import refuse_media
from peft_prefix_ext.initialization.tokens import (
    SourceTokens,
    apply_chat_template,
    bos_tokens,
    describe_count,
    encode,
    load_tokenizer,
    repeat_or_cut,
)


def exemplar_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns the tokens of as many rows of `init_exemplars` as fill the prefix; the last row is cut.

    Raises:
        ValueError: If there are no rows, a row has an unknown form, or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config, model)
    bos = bos_tokens(tokenizer)
    ids: list[int] = []
    number = 0
    for row in iter_rows(config.init_exemplars):
        ids += row_tokens(row, tokenizer, f"init_exemplars[{number}]")
        number += 1
        if len(bos) + len(ids) >= config.num_virtual_tokens:
            break
    if not ids:
        raise ValueError("`init_exemplars` must have at least one row with a token.")
    p = config.num_virtual_tokens
    # The report is saved with the adapter, so it says nothing of what is in the rows.
    report = f"exemplars, the first {number} row{'s' if number > 1 else ''} ({describe_count(len(bos) + len(ids), p)})"
    return SourceTokens([*bos, *repeat_or_cut(ids, p)][:p], report)


def row_tokens(row: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Returns the token ids of one row of a dataset, in the forms that TRL's `SFTTrainer` takes.

    Messages are rendered with the tokenizer's chat template. Other rows end with the end-of-sequence token, as they do in
    training.

    Args:
        row: A text, or a dict with `text`, `prompt` and `completion`, or `messages`.
        tokenizer: The tokenizer.
        name: The name of the row in error messages.

    Raises:
        ValueError: If the row has another form, or media.
    """
    if isinstance(row, dict):
        refuse_media(row, name)
    if isinstance(row, str):
        text: Any = row
    elif isinstance(row, dict) and "messages" in row:
        text = row["messages"]
    elif isinstance(row, dict) and row.keys() >= {"prompt", "completion"}:
        prompt, completion = row["prompt"], row["completion"]
        if not any(isinstance(prompt, kind) and isinstance(completion, kind) for kind in (str, list)):
            raise ValueError(f"`prompt` and `completion` of `{name}` must be two texts or two lists of messages.")
        text = prompt + completion
    elif isinstance(row, dict) and "text" in row:
        text = row["text"]
    else:
        found = (sorted(row) or "an empty row") if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"`{name}` must be a string or have `text`, `prompt` and `completion`, or `messages`, got {found}."
        )
    if isinstance(text, list):
        return encode(tokenizer, apply_chat_template(tokenizer, text, name))
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must hold a text or a list of messages, got {type(text).__name__}.")
    eos = tokenizer.eos_token_id
    ids = encode(tokenizer, text)
    return ids if eos is None or not ids or ids[-1] == eos else [*ids, eos]
