"""`init="exemplars"`: the prefix starts as rows of the dataset, in the form that trainers give them."""

from __future__ import annotations

import logging

import pandas
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft import PeftModel

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.initialization.exemplars import exemplar_tokens

PICTURE, WORD = object(), {"type": "text", "text": "w5"}
USER, ASSISTANT = {"role": "user", "content": "w5 w17"}, {"role": "assistant", "content": "w40"}


def tokens(rows, length, tokenizer, model):
    config = PrefixExtConfig(
        num_virtual_tokens=length, init="exemplars", init_exemplars=rows, tokenizer_name_or_path=tokenizer
    )
    return exemplar_tokens(config, model)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("w5 w17", [5, 17, 2]),
        ("w5 w2", [5, 2]),
        ({"text": "w5 w17", "label": 3}, [5, 17, 2]),
        ({"prompt": "w5 ", "completion": "w17"}, [5, 17, 2]),
        ({"messages": [USER, ASSISTANT]}, [91, 5, 17, 8, 92, 40, 8]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [91, 5, 17, 8, 92, 40, 8]),
    ],
)
def test_every_form_of_a_row(row, expected, chat_tokenizer, llama):
    assert tokens([row], 1 + len(expected), chat_tokenizer, llama).ids == [1, *expected]


@pytest.mark.parametrize(
    ("length", "expected", "report"),
    [
        (1, [1], "the first 1 row (4 tokens, cut)"),
        (4, [1, 5, 17, 2], "the first 1 row (4 tokens)"),
        (6, [1, 5, 17, 2, 40, 2], "the first 2 rows (6 tokens)"),
        (9, [1, 5, 17, 2, 40, 2, 5, 17, 2], "the first 2 rows (6 tokens, repeated)"),
    ],
)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_are_packed_up_to_the_length(length, expected, report, kind, chat_tokenizer, llama):
    rows = kind([{"text": "w5 w17"}, {"text": "w40"}])
    assert tokens(rows, length, chat_tokenizer, llama) == (expected, f"exemplars, {report}")


TEXTS = [{"text": "w5 w17"}, {"text": "w40"}]
ALL_FORMS = [{"messages": [USER, ASSISTANT]}, {"text": "w40"}, {"prompt": "w6 ", "completion": "w7"}]


def through_parquet(rows, folder):
    """Returns rows as Parquet does: lists are arrays, and missing columns None or NaN."""
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")
    return pandas.read_parquet(folder / "rows.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        lambda rows, folder: concatenate_datasets([Dataset.from_list([row]) for row in rows]),
        lambda rows, folder: concatenate_datasets([Dataset.from_list([row]) for row in rows]).to_iterable_dataset(),
        lambda rows, folder: iter(rows),
        lambda rows, folder: [{"messages": None, "text": None, "prompt": float("nan"), **row} for row in rows],
        lambda rows, folder: pandas.DataFrame(rows),
        lambda rows, folder: pandas.DataFrame(rows).convert_dtypes(),
        through_parquet,
        lambda rows, folder: pyarrow.Table.from_pylist(rows, pandas_schema(rows)),
    ],
    ids=["datasets", "stream", "iterator", "list", "pandas", "pandas' own types", "parquet", "arrow"],
)
def test_a_row_has_the_columns_that_are_not_none(kind, chat_tokenizer, llama, tmp_path):
    expected = [1, 91, 5, 17, 8, 92, 40, 8, 40, 2, 6, 7, 2]
    assert tokens(kind(ALL_FORMS, tmp_path), 13, chat_tokenizer, llama).ids == expected


def pandas_schema(rows):
    return pyarrow.Table.from_pandas(pandas.DataFrame(rows), preserve_index=False).schema


def test_a_column_of_texts(chat_tokenizer, llama):
    frame = pandas.DataFrame(TEXTS)
    for column in (frame["text"], frame["text"].to_numpy()):
        assert tokens(column, 6, chat_tokenizer, llama).ids == [1, 5, 17, 2, 40, 2]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_prefix_of_exemplars_equals_exemplars_in_context(name, chat_tokenizer):
    """The exemplars are longer than the sliding window of 24."""
    model, ids = tiny_model(name, attention="eager"), random_ids(2, 10)
    rows = [{"prompt": f"w{number} w{number + 1} ", "completion": f"w{number + 50}"} for number in range(3, 15)]
    shots = torch.tensor([tokens(rows, 40, chat_tokenizer, model).ids])
    assert len(set(shots[0].tolist())) > 20
    expected = model(input_ids=torch.cat([shots.expand(2, -1), ids], dim=1)).logits[:, 40:]
    settings = {"init": "exemplars", "init_exemplars": rows, "tokenizer_name_or_path": chat_tokenizer}
    model = with_prefix(model, num_virtual_tokens=40, **settings)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_rows_without_their_media_are_text(chat_tokenizer, llama):
    """As in a data set where some rows have images."""
    rows = [{"text": "w5 w17", "images": [], "image": None}]
    assert tokens(rows, 4, chat_tokenizer, llama).ids == [1, 5, 17, 2]


@torch.no_grad()
def test_rows_are_not_saved_and_the_report_is(chat_tokenizer, llama, tmp_path, caplog):
    settings = {"init": "exemplars", "init_exemplars": ["w77 w78"] * 9, "tokenizer_name_or_path": chat_tokenizer}
    with caplog.at_level(logging.INFO, "peft_prefix_ext"):
        model = with_prefix(llama, **settings)
    report = "7 virtual tokens: exemplars, the first 2 rows (7 tokens)"
    assert report in caplog.text
    assert model.peft_config["default"].init_report == report
    model.save_pretrained(tmp_path)
    assert "w77" not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert loaded.peft_config["default"].init_report == report
    ids = random_ids(2, 9)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must have at least one row with a token"),
        ([""], "must have at least one row with a token"),
        ([{"question": "w5", "answer": "w6"}], r"`messages`, got \['answer', 'question'\]"),
        ([7], "`messages`, got int"),
        ([{"messages": [USER]}], "cannot be rendered by the tokenizer's chat template"),
        ([{"text": "w5"}, {"text": None, "label": None}], r"`init_exemplars\[1\]` must .*, got an empty row"),
        ([{"prompt": None, "completion": "w5"}], r"`init_exemplars\[0\]` must be .*, got \['completion'\]"),
        ([{"prompt": [USER], "completion": "w5"}], r"of `init_exemplars\[0\]` must be two texts or two lists"),
        ([{"text": 5}], r"`init_exemplars\[0\]` must hold a text or a list of messages, got int"),
        ([None], r"`init_exemplars\[0\]` must be a string or have .*, got NoneType"),
        ([{"text": "w5", "images": [PICTURE]}], r"`init_exemplars\[0\]` has 'images' in it, .* takes text alone"),
        ([{"text": "w5"}, {"text": "w6", "audio": PICTURE}], r"`init_exemplars\[1\]` has 'audio' in it"),
        ([{"messages": [ASSISTANT, {"role": "user", "content": [WORD, {"type": "image"}]}]}], "has 'image' in it"),
    ],
)
def test_rows_that_cannot_be_used(rows, message, word_tokenizer, llama):
    with pytest.raises(ValueError, match=message):
        tokens(rows, 5, word_tokenizer, llama)


@pytest.mark.parametrize("splits", [DatasetDict, lambda splits: DatasetDict(splits)["train"].to_dict()])
def test_splits_and_columns_by_name_are_no_rows(splits):
    with pytest.raises(ValueError, match=r"must be rows, as a list, one split of a data set or a data frame, got"):
        PrefixExtConfig(init_exemplars=splits({"train": Dataset.from_list(TEXTS)}))
