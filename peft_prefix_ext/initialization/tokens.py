"""The token ids that a prefix starts from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig


class SourceTokens(NamedTuple):
    """`num_virtual_tokens` token ids, and a phrase on where they come from."""

    ids: list[int]
    report: str


def text_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns the tokens of `init_text`.

    They stand behind what the tokenizer begins every text with, or with `init_chat_template` inside of a system message,
    the closing tokens of which come last.

    Raises:
        ValueError: If the text has no tokens, cannot be rendered as a system message, or its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config, model)
    text, p = str(config.init_text), config.num_virtual_tokens
    if config.init_chat_template:
        begin, words, end = system_message(tokenizer, text)
    else:
        begin, words, end = beginning(tokenizer), encode(tokenizer, text), []
    if not words:
        raise ValueError(f"`init_text` must have at least one token, got {config.init_text!r}.")
    room = p - len(begin) - len(end)
    ids = [*begin, *fill(words, room), *end] if room > 0 else [*begin, *words][:p]
    quoted = repr(textwrap.shorten(text, 60, placeholder=" ..."))
    what = f"system message {quoted}" if config.init_chat_template else f"text {quoted}"
    return SourceTokens(ids, f"{what} ({counted(len(begin) + len(words) + len(end), p)})")


def given_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns `init_token_ids` as they are, repeated or cut.

    Raises:
        ValueError: If one is not in the model's vocabulary.
    """
    given, size = config.init_token_ids or [], vocabulary_size(model)
    if outside := [token for token in given if not 0 <= token < size]:
        raise ValueError(f"`init_token_ids` must be >= 0 and < {size}, the vocabulary of the model, got {outside[0]}.")
    ids = fill(given, config.num_virtual_tokens)
    return SourceTokens(ids, f"token ids ({counted(len(given), len(ids))})")


def vocabulary_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns tokens drawn at random, by torch's random state, from the vocabulary without its special tokens.

    Special is what the tokenizer says, or where there is none what the model's config names.
    """
    size = vocabulary_size(model)
    try:
        tokenizer = load_tokenizer(config, model)
    except ValueError:
        if config.tokenizer_name_or_path:
            raise
        named = model.config.get_text_config(decoder=True)
        special = [getattr(named, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
        flat = {token for entry in special for token in (entry if isinstance(entry, list) else [entry])}
        words = [token for token in range(size) if token not in flat]
    else:
        added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
        known = set(tokenizer.get_vocab().values()) - added - set(tokenizer.all_special_ids)
        words = sorted(token for token in known if token < size)
    if not words:
        raise ValueError(
            "`init='vocab'` has no words to draw from: all tokens of the tokenizer are special; use `init_text`."
        )
    drawn = torch.randint(len(words), (config.num_virtual_tokens,)).tolist()
    return SourceTokens(
        [words[number] for number in drawn], f"tokens drawn at random from {len(words)} of the vocabulary"
    )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns how many token ids the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


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


def system_message(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Returns the token ids of `text` as a system message: what opens it, its words, what closes it.

    Raises:
        ValueError: If the tokenizer's chat template does not render it.
    """
    rendered = render(tokenizer, [{"role": "system", "content": text}], "init_text")
    before, found, after = rendered.partition(text.strip())
    if not found:
        raise ValueError("`init_text` is not in what the tokenizer's chat template makes of a system message.")
    ids, head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (rendered, before, after))
    # Where tokens reach across a border, they are the words'.
    start = next((i for i, pair in enumerate(zip(head, ids, strict=False)) if len(set(pair)) > 1), len(head))
    rest = ids[start:]
    pairs = zip(reversed(tail), reversed(rest), strict=False)
    end = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), len(tail))
    return ids[:start], rest[: len(rest) - end], rest[len(rest) - end :]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], name: str) -> str:
    """Returns the messages as the tokenizer's chat template writes them.

    Raises:
        ValueError: If there is no template, or it does not take these messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"`{name}` cannot be rendered by the tokenizer's chat template ({error}).") from error


def fill(words: Sequence[int], length: int) -> list[int]:
    """Returns `length` token ids: `words`, repeated when too short and cut when too long."""
    repeats = -(-length // len(words))
    return (list(words) * repeats)[:length]


def counted(num_tokens: int, length: int) -> str:
    """Says how many tokens there were to fill a prefix of `length` with."""
    fitted = "" if num_tokens == length else ", repeated" if num_tokens < length else ", cut"
    return f"{num_tokens} token{'s' if num_tokens > 1 else ''}{fitted}"
