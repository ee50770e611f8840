"""Rows of the forms in which data sets for supervised training come, in the one form that training takes.

`prompt` and `completion`, `messages`, ShareGPT's `conversations`, Alpaca's `instruction` and `output`, and `text`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Messages = list[dict[str, Any]]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
# Where a base model has no chat template, https://github.com/tatsu-lab/stanford_alpaca.
_ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
_ALPACA_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class RowFormat:
    """A form of rows.

    Args:
        name: Its name.
        columns: The columns that it needs.
        optional: The columns that it may have besides.
        convert: Turns the needed and optional columns of one row into examples.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row, bool], list[Row]]


def examples_of(
    row: Mapping[str, Any], form: RowFormat, names: Mapping[str, str], *, has_chat_template: bool
) -> list[Row]:
    """Returns the training examples of a row.

    Args:
        row: The row.
        form: Its form.
        names: The columns of `form` by the names that the row has for them, where these differ.
        has_chat_template: Whether the tokenizer has a chat template. Only then are instructions messages.

    Returns:
        Each with `text`, or with `prompt` and `completion`: two texts, or two lists of messages. A chat has one example for
        each answer of the assistant, behind all that was said before.

    Raises:
        ValueError: If a column is empty or has another type; the message is the end of a sentence.
    """
    found = {name: row.get(names.get(name, name)) for name in (*form.columns, *form.optional)}
    for name in form.columns:
        if found[name] is None or found[name] == "" or found[name] == []:
            raise ValueError(f"`{names.get(name, name)}` is {'missing' if found[name] is None else 'empty'}")
    return form.convert(found, has_chat_template)


def format_of(columns: Collection[str], names: Mapping[str, str]) -> RowFormat | None:
    """Returns the form of rows with these columns, `None` if they have none.

    Args:
        columns: The columns.
        names: What some of them are, by the names of columns of a form.
    """
    there = {*columns} - {*names.values()} | {*names}
    return next((form for form in FORMATS if {*form.columns} <= there), None)


def _of_prompt(row: Row, has_chat_template: bool) -> list[Row]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [{"prompt": _messages(prompt, ROLES), "completion": _messages(completion, ROLES)}]
    return [{"prompt": _text("prompt", prompt), "completion": _text("completion", completion)}]


def _of_messages(row: Row, has_chat_template: bool) -> list[Row]:
    return _of_chat(_messages(row["messages"], ROLES), row["system"])


def _of_conversations(row: Row, has_chat_template: bool) -> list[Row]:
    turns = [
        {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
        if isinstance(turn, Mapping)
        else turn
        for turn in _list("conversations", row["conversations"])
    ]
    return _of_chat(_messages(turns, SHAREGPT_ROLES), row["system"])


def _of_chat(messages: Messages, system: Any) -> list[Row]:
    if system:
        messages = [{"role": "system", "content": _text("system", system)}, *messages]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    if not answers:
        raise ValueError("there is no answer of the assistant to a message")
    return [{"prompt": messages[:index], "completion": [messages[index]]} for index in answers]


def _of_instruction(row: Row, has_chat_template: bool) -> list[Row]:
    instruction, output = _text("instruction", row["instruction"]), _text("output", row["output"])
    given = _text("input", row["input"]) if row["input"] else ""
    if has_chat_template:
        opening = [{"role": "system", "content": _text("system", row["system"])}] if row["system"] else []
        question = f"{instruction}\n\n{given}" if given else instruction
        return [
            {
                "prompt": [*opening, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": output}],
            }
        ]
    template = _ALPACA_INPUT if given else _ALPACA
    return [{"prompt": template.format(instruction=instruction, input=given), "completion": output}]


def _of_text(row: Row, has_chat_template: bool) -> list[Row]:
    return [{"text": _text("text", row["text"])}]


def _messages(messages: Any, roles: Mapping[str, str]) -> Messages:
    found = []
    for message in _list("messages", messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError("each message must have a `role` and a `content`")
        role, content = message["role"], message["content"]
        if role not in roles:
            raise ValueError(f"a message has the role {role!r}, which is none of {', '.join(roles)}")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                raise ValueError("a message holds an image or a sound, which this command does not train on")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"the content of a message is {type(content).__name__}, not a text")
        if not content and not message.get("tool_calls"):
            raise ValueError(f"a message of the {roles[role]} is empty")
        rest = {name: value for name, value in message.items() if value is not None}
        found.append({**rest, "role": roles[role], "content": content or ""})
    return found


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of messages, not {type(value).__name__}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"`{name}` is empty")
    return value


# The first that fits is taken.
FORMATS = (
    RowFormat("messages", ("messages",), ("system",), _of_messages),
    RowFormat("conversations", ("conversations",), ("system",), _of_conversations),
    RowFormat("prompt and completion", ("prompt", "completion"), (), _of_prompt),
    RowFormat("instruction and output", ("instruction", "output"), ("input", "system"), _of_instruction),
    RowFormat("text", ("text",), (), _of_text),
)
