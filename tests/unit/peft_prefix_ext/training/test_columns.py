"""Rows of the forms that data sets have, as the examples that training takes."""

from __future__ import annotations

import pytest

from peft_prefix_ext.training.columns import examples_of, format_of

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
EXAMPLE = {"prompt": [USER], "completion": [ANSWER]}


def examples(row, names=None, has_chat_template=True):
    form = format_of(list(row), names or {})
    return examples_of(row, form, names or {}, has_chat_template=has_chat_template)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a =>", "completion": " b"}, {"prompt": "a =>", "completion": " b"}),
        ({"prompt": [USER], "completion": [ANSWER]}, EXAMPLE),
        ({"messages": [USER, ANSWER]}, EXAMPLE),
        ({"messages": [USER, ANSWER], "system": "Be kind."}, {"prompt": [SYSTEM, USER], "completion": [ANSWER]}),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]}, EXAMPLE),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, EXAMPLE),
        ({"conversations": [USER, ANSWER]}, EXAMPLE),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, EXAMPLE),
        (
            {"instruction": "Hi", "input": "x", "output": "Hello", "system": "Be kind."},
            {"prompt": [SYSTEM, {"role": "user", "content": "Hi\n\nx"}], "completion": [ANSWER]},
        ),
        ({"text": "a b", "id": 3}, {"text": "a b"}),
    ],
    ids=[
        "prompt",
        "messages in prompt",
        "messages",
        "system",
        "parts",
        "sharegpt",
        "openai",
        "alpaca",
        "input",
        "text",
    ],
)
def test_one_example_of_each_form(row, expected):
    assert examples(row) == [expected]


def test_each_answer_of_a_chat_is_an_example():
    chat = [SYSTEM, USER, ANSWER, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Well."}]
    assert examples({"messages": chat}) == [
        {"prompt": chat[:2], "completion": chat[2:3]},
        {"prompt": chat[:4], "completion": chat[4:]},
    ]


def test_instructions_without_a_chat_template_are_text():
    (example,) = examples({"instruction": "Add.", "input": "1 2", "output": "3"}, has_chat_template=False)
    assert example["prompt"] == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert example["completion"] == "3"
    (example,) = examples({"instruction": "Add.", "output": "3"}, has_chat_template=False)
    assert example["prompt"] == "### Instruction:\nAdd.\n\n### Response:\n"


def test_columns_of_other_names():
    names = {"prompt": "question", "completion": "reply"}
    assert examples({"question": "a", "reply": "b", "text": "c"}, names) == [{"prompt": "a", "completion": "b"}]
    assert format_of(["question", "reply"], {}) is None
    # A column that is named for something else is not what its own name says.
    assert format_of(["prompt", "text"], {"completion": "text"}).name == "prompt and completion"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": ""}, "`completion` is empty"),
        ({"prompt": "a", "completion": "  "}, "`completion` is empty"),
        ({"prompt": None, "completion": "b"}, "`prompt` is missing"),
        ({"prompt": "a", "completion": 3}, "`completion` must be a text, not int"),
        ({"prompt": [USER], "completion": "b"}, "`prompt` must be a text, not list"),
        ({"messages": "Hi"}, "`messages` must be a list of messages, not str"),
        ({"messages": [USER]}, "there is no answer of the assistant"),
        ({"messages": [{"role": "bot", "content": "x"}, ANSWER]}, "the role 'bot'"),
        ({"messages": [USER, {"role": "assistant"}]}, "a `role` and a `content`"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "a message of the assistant is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "an image or a sound"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "is int, not a text"),
        ({"instruction": "a", "output": None}, "`output` is missing"),
        ({"text": ["a"]}, "`text` must be a text, not list"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        examples(row)
