"""`init="exemplars"`: the prefix starts as rows of the data set, as a trainer would show them."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from prefixed import with_prefix
from tiny import random_ids, tiny_model

from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.initialization.exemplars import exemplar_tokens

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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_prefix_of_exemplars_equals_exemplars_in_context(name, chat_tokenizer):
    """Longer than the sliding window of 24: its layers see the same tokens as the others."""
    model, ids = tiny_model(name, attention="eager"), random_ids(2, 10)
    rows = [{"prompt": f"w{number} w{number + 1} ", "completion": f"w{number + 50}"} for number in range(3, 15)]
    shots = torch.tensor([tokens(rows, 40, chat_tokenizer, model).ids])
    assert len(set(shots[0].tolist())) > 20
    expected = model(input_ids=torch.cat([shots.expand(2, -1), ids], dim=1)).logits[:, 40:]
    settings = {"init": "exemplars", "init_exemplars": rows, "tokenizer_name_or_path": chat_tokenizer}
    model = with_prefix(model, num_virtual_tokens=40, **settings)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-4)


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
    ],
)
def test_rows_that_cannot_be_used(rows, message, word_tokenizer, llama):
    with pytest.raises(ValueError, match=message):
        tokens(rows, 5, word_tokenizer, llama)
