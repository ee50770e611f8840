"""What a student starts from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.distillation.student import check_length, sample_chunks


@given(length=st.integers(2, 300), data=st.data(), seed=st.integers(0, 100))
def test_sampled_chunks_are_of_the_context_in_its_order(length, data, seed):
    number = data.draw(st.integers(1, length - 1))
    ids = list(range(length))
    found = sample_chunks(ids, number, seed)
    assert len(found) == number
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found == sample_chunks(ids, number, seed)


def test_chunks_are_longer_than_a_token():
    found = sample_chunks(list(range(1_000)), 65, 0)
    neighbours = sum(second == first + 1 for first, second in pairwise(found))
    assert neighbours >= 58
    assert found != sample_chunks(list(range(1_000)), 65, 1)


def test_a_prefix_as_long_as_its_context_is_refused():
    check_length(Context([1, 2, 3]), DistillationSettings(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="The context has 3 tokens, no more than the 3 virtual tokens"):
        check_length(Context([1, 2, 3]), DistillationSettings(num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_virtual_tokens", 0),
        ("num_virtual_tokens", 2.5),
        ("batch_size", True),
        ("init", "last"),
        ("reparam", "lora"),
        ("temperature", -1.0),
        ("num_epochs", 0),
        ("learning_rate", 0.0),
        ("token_dropout", 1.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        DistillationSettings(**{name: value})
