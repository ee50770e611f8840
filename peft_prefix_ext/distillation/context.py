"""What every request would carry in its context: a text, documents, or the opening messages of a chat, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.checkpoint.context import text_hash
from peft_prefix_ext.distillation.chat_template import continuation_template, render_opening
from peft_prefix_ext.initialization.tokens import bos_tokens, encode

Messages = list[dict[str, Any]]
# Between documents.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Context:
    """A context in tokens.

    Args:
        token_ids: Its token ids, with the beginning-of-sequence token if the tokenizer adds one.
        sources: The SHA-256 of each source by name, in hex.
        messages: The opening of a chat; empty if the context is no chat.
        chat_template: What renders the messages after the opening of a chat; `None` if the context is no chat.
        chat_template_sha256: The SHA-256 of the tokenizer's chat template that it was made from, in hex.
    """

    token_ids: list[int]
    sources: dict[str, str] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    chat_template: str | None = None
    chat_template_sha256: str | None = None

    def record(self) -> dict[str, Any]:
        """Returns what the config of an adapter keeps of it as `context`; the template holds the messages of a chat."""
        return {name: getattr(self, name) for name in ("sources", "chat_template", "chat_template_sha256")}

    @property
    def digest(self) -> str:
        """The SHA-256, in hex, of what it says and of the template that renders it, on whatever day that is."""
        return text_hash(json.dumps([self.messages or self.token_ids, self.chat_template_sha256]))


def text_context(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str] = ()) -> Context:
    """Returns the context of one text, or of several documents with a blank line between them.

    Args:
        tokenizer: The tokenizer of the base model.
        texts: The texts, in order.
        names: Their names, by which their hashes are recorded; numbered by default.

    Raises:
        ValueError: If there is nothing in them.
    """
    empty = [number for number, text in enumerate(texts) if not text.strip()]
    if empty or not texts:
        what = names[empty[0]] if empty and names else "The context"
        raise ValueError(f"{what} is empty: give a text with at least one word.")
    ids = [*bos_tokens(tokenizer), *encode(tokenizer, SEPARATOR.join(texts))]
    given = names or [f"text {number}" for number in range(1, len(texts) + 1)]
    return Context(ids, _hashes(dict(zip(given, texts, strict=True))))


def chat_context(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, sources: Mapping[str, str] | None = None
) -> Context:
    """Returns the context of the opening messages of a chat: a system message, worked examples, or both.

    Args:
        tokenizer: The tokenizer of the base model, with a chat template.
        messages: The messages, dicts with `role` and `content`.
        sources: The texts that they come from by name, whose hashes are recorded; by default, all of them as `messages`.

    Raises:
        ValueError: If there are none, or the chat template renders them differently when messages follow.
    """
    if not any(str(message.get("content") or "").strip() for message in messages):
        raise ValueError("The chat is empty: give at least one message with a text.")
    rendered = render_opening(tokenizer, messages)
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    template = continuation_template(tokenizer, messages, rendered)
    hashes = _hashes(sources or {"messages": json.dumps(messages, sort_keys=True)})
    return Context(ids, hashes, messages, template, text_hash(tokenizer.get_chat_template()))


def read_messages(path: str | Path) -> Messages:
    """Reads the opening messages of a chat from a JSON file: a list of them, or an object with `messages`.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    messages: Any = found.get("messages") if isinstance(found, dict) else found
    if not are_messages(messages):
        raise ValueError(f'{path} must hold messages, [{{"role": ..., "content": ...}}, ...].')
    return list(messages)


def are_messages(value: Any) -> bool:
    """Whether these are messages: a list of dicts with `role` and `content`."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each for each in value
    )


def read_text(path: str | Path) -> str:
    """Reads a text file.

    Raises:
        ValueError: If it is not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8; convert it first.") from error


def _hashes(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text_hash(text) for name, text in texts.items()}
