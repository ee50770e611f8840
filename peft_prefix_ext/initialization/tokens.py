"""The token ids that a prefix starts from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig


class SourceTokens(NamedTuple):
    """`num_virtual_tokens` token ids, and a phrase on where they come from."""

    ids: list[int]
    report: str


def text_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns the tokens of `init_text`, behind what the tokenizer begins every text with.

    Raises:
        ValueError: If the text has no tokens or its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config, model)
    begin, words = beginning(tokenizer), encode(tokenizer, str(config.init_text))
    if not words:
        raise ValueError(f"`init_text` must have at least one token, got {config.init_text!r}.")
    ids = fill(begin, words, config.num_virtual_tokens)
    quoted = textwrap.shorten(str(config.init_text), 60, placeholder=" ...")
    return SourceTokens(ids, f"text {quoted!r} ({counted(len(begin) + len(words), ids)})")


def load_tokenizer(config: PrefixExtConfig, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that the config names, or else the base model's own."""
    source = config.tokenizer_name_or_path or model.name_or_path
    if not source:
        raise ValueError("`tokenizer_name_or_path` must be given: the base model does not say where it came from.")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer for `init` at {source!r}; give `tokenizer_name_or_path`.") from error


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the beginning-of-sequence token, if the tokenizer puts one before every text: it is the attention sink."""
    return [token for token in tokenizer("a").input_ids[:1] if token == tokenizer.bos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of `text` without its `beginning`, which stands in a prefix once, however often a text does."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = beginning(tokenizer)
    return ids[1:] if begin and ids[:1] == begin else ids


def fill(begin: Sequence[int], words: Sequence[int], length: int) -> list[int]:
    """Returns `length` token ids: `begin` once, then `words`, repeated when too short and cut when too long."""
    repeats = -(-length // len(words))
    return [*begin, *list(words) * repeats][:length]


def counted(num_tokens: int, ids: Sequence[int]) -> str:
    """Says how many tokens there were to fill a prefix of `ids` with."""
    fitted = "" if num_tokens == len(ids) else ", repeated" if num_tokens < len(ids) else ", cut"
    return f"{num_tokens} token{'s' if num_tokens > 1 else ''}{fitted}"
