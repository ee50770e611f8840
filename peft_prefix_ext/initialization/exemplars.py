"""Rows of a data set, packed one behind the other, as token ids that a prefix starts from.

A prefix that starts as a few worked examples is few-shot prompting, trained on from there.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization.tokens import SourceTokens, beginning, counted, encode, fill, load_tokenizer, render


def exemplar_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns as many rows of `init_exemplars` as fill the prefix, the last of them cut.

    Raises:
        ValueError: If there are no rows, or one is of no known form, or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config, model)
    begin = beginning(tokenizer)
    rows: list[int] = []
    number = 0
    for number, row in enumerate(config.init_exemplars or [], start=1):  # noqa: B007
        rows += row_tokens(row, tokenizer)
        if len(begin) + len(rows) >= config.num_virtual_tokens:
            break
    if not rows:
        raise ValueError("`init_exemplars` must have at least one row with a token.")
    p = config.num_virtual_tokens
    # What the rows say stays out of the report, which is saved with the adapter.
    report = f"exemplars, the first {number} row{'s' if number > 1 else ''} ({counted(len(begin) + len(rows), p)})"
    return SourceTokens([*begin, *fill(rows, p)][:p], report)


def row_tokens(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids of one row of a data set, in any form that TRL's `SFTTrainer` takes.

    Messages are rendered by the tokenizer's chat template. Other rows end with the end-of-sequence token, as they do in
    training.
    """
    if isinstance(row, str):
        text: Any = row
    elif isinstance(row, dict) and "messages" in row:
        text = row["messages"]
    elif isinstance(row, dict) and row.keys() >= {"prompt", "completion"}:
        text = row["prompt"] + row["completion"]
    elif isinstance(row, dict) and "text" in row:
        text = row["text"]
    else:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            "A row of `init_exemplars` must be a string or have `text`, `prompt` and `completion`, or `messages`, got "
            f"{found}."
        )
    if not isinstance(text, str):
        return encode(tokenizer, render(tokenizer, text, "init_exemplars"))
    end = tokenizer.eos_token_id
    ids = encode(tokenizer, text)
    return ids if end is None or not ids or ids[-1] == end else [*ids, end]
