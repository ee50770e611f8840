"""Questions to a context: what clients will send behind it, from a file, or written by the model (`synthesis.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_prefix_ext.distillation.context import Messages, are_messages, read_text


@dataclass(frozen=True)
class Question:
    """What a client sends behind a context.

    Args:
        messages: The messages, of which the last is the user's.
        reference: The right answer, if one is known. It is never trained on: only the report scores with it.
    """

    messages: Messages
    reference: str | None = None


def read_questions(path: str | Path) -> list[Question]:
    """Reads questions from a file of JSON lines, or of plain text with a question per line.

    A line of JSON is a string, an object with `question` and optionally `answer`, or one with `messages`, whose last may be
    the assistant's: then it is the reference.

    Raises:
        ValueError: If a line is something else, or there is none.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    is_json = str(path).endswith((".json", ".jsonl"))
    questions = list(_parse(path, lines)) if is_json else [_of_text(line.strip()) for _, line in lines]
    if not questions:
        raise ValueError(f"{path} holds no questions: give one per line.")
    return questions


def _parse(path: str | Path, lines: list[tuple[int, str]]) -> Iterator[Question]:
    for number, line in lines:
        try:
            yield _of_json(json.loads(line))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}, line {number} is no question: give {{"question": ..., "answer": ...}}, {{"messages": [...]}} or a '
                "string."
            ) from error


def _of_json(row: Any) -> Question:
    if isinstance(row, str):
        return _of_text(row)
    if "messages" not in row:
        return _of_text(row["question"], row.get("answer"))
    messages = row["messages"]
    if not are_messages(messages):
        raise ValueError("each message has a role and a content")
    *_, before, last = [None, *(message["role"] for message in messages)]
    if (before, last) == ("user", "assistant"):
        return Question(messages[:-1], str(messages[-1]["content"]))
    if last != "user":
        raise ValueError("the last message must be the user's, or the answer to it")
    return Question(messages)


def _of_text(text: str, reference: str | None = None) -> Question:
    if not isinstance(text, str) or not text.strip() or not isinstance(reference, str | None):
        raise ValueError("a question must be a text")
    return Question([{"role": "user", "content": text}], reference)
