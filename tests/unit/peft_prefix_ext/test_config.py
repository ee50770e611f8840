"""Each wrong argument is refused in one sentence with its name and its value."""

from __future__ import annotations

import pytest

from peft_prefix_ext import PrefixExtConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "`num_virtual_tokens` must be an integer >= 1, got 0"),
        ({"num_virtual_tokens": 2.5}, "`num_virtual_tokens` must be an integer >= 1, got 2.5"),
        ({"num_virtual_tokens": None}, "`num_virtual_tokens` must be an integer >= 1, got None"),
        ({"init": "zero"}, r"`init` must be one of \('random', .*\), got 'zero'"),
        ({"init": "text"}, "`init_text` must be given when `init='text'`"),
        ({"init": "random", "init_text": "x"}, "`init_text` is only used with `init='text'`, got `init='random'`"),
        ({"init_text": "x", "init_token_ids": [1]}, "`init_text` is only used with `init='text'`, got `init='tokens'`"),
        ({"init": "exemplars"}, "`init_exemplars` must be given when `init='exemplars'`"),
        ({"init": "exemplars", "init_exemplars": "a row"}, "`init_exemplars` must be rows, .* got str"),
        ({"init": "exemplars", "init_exemplars": {"train": []}}, "`init_exemplars` must be rows, .* got dict"),
        ({"init": "tokens"}, "`init_token_ids` must be given when `init='tokens'`"),
        ({"init": "tokens", "init_token_ids": [1.5]}, r"`init_token_ids` must be a list of integers, got \[1.5\]"),
        ({"init": "tokens", "init_token_ids": []}, r"`init_token_ids` must be a list of integers, got \[\]"),
        ({"init": "kv"}, "`init_kv` must be given when `init='kv'`"),
        ({"init": "average"}, "`init_adapter` must be given when `init='average'`"),
        ({"init": "average", "init_adapter": "a/b"}, "must be a list of paths or repositories .*, got 'a/b'"),
        ({"init": "average", "init_adapter": []}, r"must be a list of paths or repositories .*, got \[\]"),
        ({"init": "adapter", "init_adapter": ["a/b"]}, "`init_adapter` must be a path or a repository, got"),
        (
            {"init": "random", "init_adapter": "a/b"},
            "only used with `init='adapter'` or `init='average'`, got `init='random'`",
        ),
        ({"init_adapter_part": "keys"}, "`init_adapter_part` is only used with `init='adapter'` or"),
        (
            {"init": "adapter", "init_adapter": "a/b", "init_adapter_part": "values"},
            r"`init_adapter_part` must be one of \('all', 'keys'\), got 'values'",
        ),
        ({"init_chat_template": True}, "`init_chat_template` is only used with `init='text'`, got `init='random'`"),
        ({"prefix_dropout": -0.1}, r"`prefix_dropout` must be in \[0, 1\), got -0.1"),
        ({"token_dropout": 1.0}, r"`token_dropout` must be in \[0, 1\), got 1.0"),
        ({"init_std": -1.0}, "`init_std` must be >= 0, got -1.0"),
        ({"num_virtual_tokens": 4, "num_frozen_tokens": 4}, "must be < `num_virtual_tokens`, got 4 and 4"),
        ({"num_frozen_tokens": -1}, "`num_frozen_tokens` must be an integer >= 0, got -1"),
        ({"reparam": "lstm"}, r"`reparam` must be one of \('none', 'mlp'\), got 'lstm'"),
        ({"reparam_hidden_size": 0}, "`reparam_hidden_size` must be an integer >= 1, got 0"),
        ({"reparam_num_layers": 0}, "`reparam_num_layers` must be an integer >= 1, got 0"),
        ({"reparam_latent_size": True}, "`reparam_latent_size` must be an integer >= 1, got True"),
        ({"reparam_activation": "wild"}, "`reparam_activation` must be one of .*, got 'wild'"),
        ({"reparam_dropout": 1.0}, r"`reparam_dropout` must be in \[0, 1\), got 1.0"),
        ({"trainable_token_indices": 3}, "`trainable_token_indices` must be a list of integers, got 3"),
        ({"trainable_token_indices": {"embed_tokens": ["w3"]}}, r"must be a list of integers, got \['w3'\]"),
        ({"task_type": "POETRY"}, "POETRY"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixExtConfig(**arguments)


@pytest.mark.parametrize(
    ("given", "init"),
    [
        ({}, "random"),
        ({"init_text": "Summarize:"}, "text"),
        ({"init_token_ids": [1, 2]}, "tokens"),
        ({"init_exemplars": ["a row"]}, "exemplars"),
        ({"init_kv": []}, "kv"),
        ({"init_adapter": "a/b"}, "adapter"),
        ({"init_adapter": ["a/b", "c/d"]}, "average"),
    ],
)
def test_init_follows_the_argument_that_is_given(given, init):
    assert PrefixExtConfig(**given).init == init


def test_round_trip(tmp_path):
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=9,
        reparam="mlp",
        reparam_activation="gelu",
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    config.save_pretrained(tmp_path)
    assert PrefixExtConfig.from_pretrained(tmp_path) == config
