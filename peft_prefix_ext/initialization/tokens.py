"""Initial tokens of a prefix: listed, from a text, or drawn from the vocabulary; and how to fill a prefix with them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.initialization.media import placeholder_tokens


class SourceTokens(NamedTuple):
    """`num_virtual_tokens` token ids, and a phrase on their source."""

    ids: list[int]
    report: str


def listed_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns `init_token_ids`, repeated or cut.

    Raises:
        ValueError: If an id is not in the model's vocabulary.
    """
    listed, size = config.init_token_ids or [], vocabulary_size(model)
    if outside := [token for token in listed if not 0 <= token < size]:
        raise ValueError(f"`init_token_ids` must be >= 0 and < {size}, the vocabulary of the model, got {outside[0]}.")
    ids = repeat_or_cut(listed, config.num_virtual_tokens)
    return SourceTokens(ids, f"token ids ({describe_count(len(listed), len(ids))})")


def text_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns the tokens of `init_text`, after the beginning-of-sequence token, if the tokenizer adds one.

    With `init_chat_template` the text is the content of a system message, whose closing tokens come last.

    Raises:
        ValueError: If the text has no tokens, cannot be rendered as a system message, or its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config, model)
    text, p = str(config.init_text), config.num_virtual_tokens
    if config.init_chat_template:
        begin, words, end = encode_system_message(tokenizer, text)
    else:
        begin, words, end = bos_tokens(tokenizer), encode(tokenizer, text), []
    if not words:
        raise ValueError(f"`init_text` must have at least one token, got {config.init_text!r}.")
    room = p - len(begin) - len(end)
    ids = [*begin, *repeat_or_cut(words, room), *end] if room > 0 else [*begin, *words][:p]
    quoted = repr(textwrap.shorten(text, 60, placeholder=" ..."))
    what = f"system message {quoted}" if config.init_chat_template else f"text {quoted}"
    return SourceTokens(ids, f"{what} ({describe_count(len(begin) + len(words) + len(end), p)})")


def vocabulary_tokens(config: PrefixExtConfig, model: PreTrainedModel) -> SourceTokens:
    """Returns tokens drawn from the vocabulary without special tokens, by torch's random state.

    The tokenizer tells which tokens are special; if there is none, the model's config does.

    Raises:
        ValueError: If all tokens are special, or `tokenizer_name_or_path` cannot be loaded.
    """
    size = vocabulary_size(model)
    try:
        tokenizer = load_tokenizer(config, model)
    except ValueError:
        if config.tokenizer_name_or_path:
            raise
        text_config = model.config.get_text_config(decoder=True)
        entries = [getattr(text_config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
        special = {token for entry in entries for token in (entry if isinstance(entry, list) else [entry])}
        words = [token for token in range(size) if token not in special | placeholder_tokens(model)]
    else:
        added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
        known = set(tokenizer.get_vocab().values()) - added - set(tokenizer.all_special_ids) - placeholder_tokens(model)
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
    """Returns the tokenizer that the config names, or else that of the base model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    source = config.tokenizer_name_or_path or model.name_or_path
    if not source:
        raise ValueError("`tokenizer_name_or_path` must be given: the base model does not say where it came from.")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer for `init` at {source!r}; give `tokenizer_name_or_path`.") from error


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the beginning-of-sequence token, the attention sink, if the tokenizer adds one to every text."""
    return [token for token in tokenizer("a").input_ids[:1] if token == tokenizer.bos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of `text` without `bos_tokens`, which a prefix has once, however many texts it has."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = bos_tokens(tokenizer)
    return ids[1:] if bos and ids[:1] == bos else ids


def encode_system_message(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Returns the token ids of `text` as a system message: those that open it, the text, those that close it.

    Raises:
        ValueError: If the chat template does not render a system message with this text.
    """
    rendered, before, after = _render_system_message(tokenizer, text)
    ids, head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (rendered, before, after))
    # A token across a boundary belongs to the text.
    start = next((i for i, pair in enumerate(zip(head, ids, strict=False)) if len(set(pair)) > 1), len(head))
    rest = ids[start:]
    pairs = zip(reversed(tail), reversed(rest), strict=False)
    end = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), len(tail))
    return ids[:start], rest[: len(rest) - end], rest[len(rest) - end :]


def _render_system_message(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str, str]:
    """Returns `text` as a system message, and what is before and after the text in it."""
    error = ValueError("`init_text` is not in what the tokenizer's chat template makes of a system message.")
    # Templates of vision-language models may take a list of parts, and fail on a text or leave it out.
    parts: list[Any] = [text, [{"type": "text", "text": text}]]
    for number, content in enumerate(parts):
        try:
            rendered = apply_chat_template(tokenizer, [{"role": "system", "content": content}], "init_text")
        except ValueError as failure:
            error = error if number else failure
            continue
        before, found, after = rendered.partition(text.strip())
        if found:
            return rendered, before, after
    raise error


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], name: str) -> str:
    """Returns the messages as the tokenizer's chat template renders them.

    Args:
        tokenizer: The tokenizer.
        messages: The messages, dicts with `role` and `content`.
        name: The name of the source in error messages.

    Raises:
        ValueError: If there is no template, or it rejects the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"`{name}` cannot be rendered by the tokenizer's chat template ({error}).") from error


def repeat_or_cut(ids: Sequence[int], length: int) -> list[int]:
    """Returns `length` token ids: `ids` repeated if too short, cut if too long."""
    repeats = -(-length // len(ids))
    return (list(ids) * repeats)[:length]


def describe_count(num_tokens: int, length: int) -> str:
    """Returns a phrase on how many tokens filled a prefix of `length`."""
    fitted = "" if num_tokens == length else ", repeated" if num_tokens < length else ", cut"
    return f"{num_tokens} token{'s' if num_tokens > 1 else ''}{fitted}"
