"""Questions from files."""

from __future__ import annotations

import json

import pytest

from peft_prefix_ext.distillation.questions import Question, read_questions

USER = {"role": "user", "content": "Where?"}


def test_lines_of_text(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text('Where is it?\n\n  {"not": "JSON"} \n', encoding="utf-8")
    assert read_questions(path) == [
        Question([{"role": "user", "content": "Where is it?"}]),
        Question([{"role": "user", "content": '{"not": "JSON"}'}]),
    ]


def test_lines_of_json(tmp_path):
    path = tmp_path / "queries.jsonl"
    turns = [USER, {"role": "assistant", "content": "There."}]
    rows = ["Where?", {"question": "Where?", "answer": "There."}, {"messages": turns}, {"messages": [*turns, USER]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_questions(path) == [
        Question([USER]),
        Question([USER], "There."),
        Question([USER], "There."),
        Question([*turns, USER]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "1",
        "[]",
        '""',
        '{"answer": "x"}',
        '{"question": 1}',
        '{"question": "a", "answer": 2}',
        '{"messages": []}',
        '{"messages": [{"content": "x"}]}',
        '{"messages": [{"role": "system", "content": "x"}]}',
        '{"messages": 1}',
        "null",
    ],
)
def test_other_lines_are_refused(tmp_path, line):
    path = tmp_path / "queries.jsonl"
    path.write_text('"Where?"\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"queries.jsonl, line 2 is no question: give"):
        read_questions(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no questions: give one per line"):
        read_questions(path)
