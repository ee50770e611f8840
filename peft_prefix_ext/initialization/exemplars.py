"""Rows of a data set, packed one behind the other, as token ids that a prefix starts from.

A prefix that starts as a few worked examples is few-shot prompting, trained on from there.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.dataset_rows import iter_rows
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
    for row in iter_rows(config.init_exemplars):
        rows += row_tokens(row, tokenizer, f"init_exemplars[{number}]")
        number += 1
        if len(begin) + len(rows) >= config.num_virtual_tokens:
            break
    if not rows:
        raise ValueError("`init_exemplars` must have at least one row with a token.")
    p = config.num_virtual_tokens
    # What the rows say stays out of the report, which is saved with the adapter.
    report = f"exemplars, the first {number} row{'s' if number > 1 else ''} ({counted(len(begin) + len(rows), p)})"
    return SourceTokens([*begin, *fill(rows, p)][:p], report)


def row_tokens(row: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Returns the token ids of one row of a data set, a text or messages, in the forms that TRL's `SFTTrainer` takes.

    Messages are rendered by the tokenizer's chat template. Other rows end with the end-of-sequence token, as they do in
    training.

    Raises:
        ValueError: If the row, which is called `name`, has neither.
    """
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
        return encode(tokenizer, render(tokenizer, text, name))
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must hold a text or a list of messages, got {type(text).__name__}.")
    end = tokenizer.eos_token_id
    ids = encode(tokenizer, text)
    return ids if end is None or not ids or ids[-1] == end else [*ids, end]
