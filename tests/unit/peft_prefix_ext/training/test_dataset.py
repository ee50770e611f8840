"""Data sets from files and folders, split into examples to train on and others."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from peft_prefix_ext.training.dataset import MAX_HELD_OUT, parse_columns, read_examples

ROWS = [{"prompt": f"q{index}", "completion": f"a{index}"} for index in range(40)]


def lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def everything(examples):
    return sorted(row["prompt"] for row in examples.train + examples.held_out)


@pytest.mark.parametrize("kind", ["jsonl", "json", "bom", "parquet", "csv", "tsv", "saved", "folder"])
def test_every_kind_of_data_set_gives_the_same_rows(kind, tmp_path):
    dataset = Dataset.from_list(ROWS)
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        lines(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "bom":
        path = tmp_path / "data.jsonl"
        path.write_text("\ufeff" + "\r\n".join(map(json.dumps, ROWS)))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind in ("csv", "tsv"):
        dataset.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    elif kind == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        lines(path / "rows.jsonl", ROWS)
    examples = read_examples(str(path))
    assert everything(examples) == sorted(row["prompt"] for row in ROWS)
    assert len(examples.held_out) == 4
    assert examples == read_examples(str(path))
    assert examples.train != read_examples(str(path), seed=1).train


@pytest.mark.parametrize(("held_out", "number"), [(0.25, 10), (7, 7), (0.001, 1), (1.0, 1)])
def test_a_share_or_a_number_is_held_out(held_out, number, tmp_path):
    examples = read_examples(lines(tmp_path / "data.jsonl", ROWS), held_out=held_out)
    assert len(examples.held_out) == number
    assert not {row["prompt"] for row in examples.train} & {row["prompt"] for row in examples.held_out}


def test_no_more_is_held_out_than_is_useful(tmp_path):
    path = lines(tmp_path / "data.jsonl", [{"text": str(index)} for index in range(10 * MAX_HELD_OUT + 100)])
    assert len(read_examples(path).held_out) == MAX_HELD_OUT


def test_a_split_of_the_data_set_is_held_out(tmp_path):
    splits = {"train": ROWS[:30], "test": ROWS[30:35], "validation": ROWS[35:]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    examples = read_examples(str(tmp_path / "saved"))
    assert (examples.train, examples.held_out) == (ROWS[:30], ROWS[35:])
    assert read_examples(str(tmp_path / "saved"), split="test").train == ROWS[30:35]
    with pytest.raises(ValueError, match="has no split 'dev': name one of train, test, validation with --split"):
        read_examples(str(tmp_path / "saved"), split="dev")


def test_another_data_set_is_held_out(tmp_path):
    data, other = lines(tmp_path / "data.jsonl", ROWS), lines(tmp_path / "other.jsonl", [{"text": "x"}])
    examples = read_examples(data, eval_data=other)
    assert examples.train == ROWS
    assert examples.held_out == [{"text": "x"}]


def test_answers_of_one_chat_stay_together(tmp_path):
    def chat(index):
        turns = [("user", f"{index}"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    examples = read_examples(lines(tmp_path / "data.jsonl", map(chat, range(10))), held_out=3)
    assert (len(examples.train), len(examples.held_out)) == (14, 6)
    assert examples.is_chat
    held_out = {row["prompt"][0]["content"] for row in examples.held_out}
    assert len(held_out) == 3
    assert not held_out & {row["prompt"][0]["content"] for row in examples.train}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, "{oops", '{"prompt": 3}'], r"1 bad row: line 41: no JSON \(.*\)\. Correct or remove"),
        ([*ROWS, "3"], "1 bad row: line 41: int, not an object"),
        ([{"prompt": "a", "completion": ""}, *ROWS], "1 bad row: line 1: `completion` is empty"),
        ([*ROWS, *[{"prompt": "a"}] * 5], "5 bad rows: line 41: `completion` is missing; line 42: .*; and 2 more"),
        ([{"question": "a", "answer": "b"}], "has the columns question, answer, but training needs one of: messages"),
        ([], "has no rows"),
        ([ROWS[0]], "has 1 row, of which 1 cannot be held out"),
    ],
    ids=["no json", "no object", "empty", "missing", "columns", "nothing", "one row"],
)
def test_bad_rows_are_named_by_line(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_examples(lines(tmp_path / "data.jsonl", rows))


def test_lines_are_counted_with_the_empty_ones(tmp_path):
    with pytest.raises(ValueError, match="line 3: `text` must be a text"):
        read_examples(lines(tmp_path / "data.jsonl", [{"text": "a"}, "", {"text": 3}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.xlsx", b"x", r"is of no kind that can be read: give a file that ends with \.jsonl, "),
        ("data.parquet", b"no parquet", "cannot be read"),
        ("data.jsonl", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("data.json", b"[1, 2", "line 1, is no JSON"),
    ],
)
def test_a_file_that_cannot_be_read_says_so_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_examples(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_a_place_without_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="There is no data set at"):
        read_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        read_examples(str(tmp_path / "empty"))


def test_columns_are_named(tmp_path):
    path = lines(tmp_path / "data.jsonl", [{"question": f"q{index}", "answer": "a"} for index in range(10)])
    names = parse_columns(["prompt=question", "completion=answer"])
    assert read_examples(path, columns=names).train[0].keys() == {"prompt", "completion"}
    with pytest.raises(ValueError, match="has no column 'reply', only question, answer"):
        read_examples(path, columns={"prompt": "question", "completion": "reply"})
    with pytest.raises(
        ValueError, match=r"--columns takes NAME=COLUMN with NAME one of completion, .*, got 'question'"
    ):
        parse_columns(["question"])
