"""Options of a trainer's file become a config, and what is wrong with them is said in one sentence."""

from __future__ import annotations

import pytest
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from helpers.tiny import tiny_config, tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.integrations.options import config_of, option_names, task_type_of


def test_options_are_fields_of_the_config() -> None:
    options = {"num_virtual_tokens": 8, "init_exemplars": ["a => b", {"prompt": "c =>", "completion": " d"}]}
    assert config_of(options) == PrefixExtConfig(task_type="CAUSAL_LM", **options)
    assert config_of(None) == PrefixExtConfig(task_type="CAUSAL_LM")
    assert config_of({"task_type": "SEQ_CLS"}, "CAUSAL_LM").task_type == "SEQ_CLS"


def test_what_the_tuner_sets_is_no_option() -> None:
    assert {"task_type", "num_virtual_tokens", "init_text", "modules_to_save"} <= set(option_names())
    assert not {"prefix_layers", "init_report", "format_version", "peft_type"} & set(option_names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_token": 8}, "no option 'num_virtual_token': take one of task_type, num_virtual_tokens, init, "),
        ({"base_fingerprint": {}}, "no option 'base_fingerprint'"),
        ({"num_virtual_tokens": 0}, "`num_virtual_tokens` must be an integer >= 1"),
        ({"init": "text"}, "`init_text` must be given"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(options)


def test_the_head_says_the_task() -> None:
    assert task_type_of(tiny_model("llama")) == "CAUSAL_LM"
    assert task_type_of(AutoModelForSequenceClassification.from_config(tiny_config("llama"))) == "SEQ_CLS"
    assert task_type_of(AutoModelForTokenClassification.from_config(tiny_config("llama"))) == "TOKEN_CLS"
