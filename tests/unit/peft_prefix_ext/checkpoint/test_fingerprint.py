"""The fields of a fingerprint."""

from __future__ import annotations

from helpers.tiny import tiny_config
from peft_prefix_ext.checkpoint.fingerprint import fingerprint


def test_a_window_of_zero_is_none():
    config = tiny_config("qwen2_moe")
    assert config.sliding_window == 0
    assert fingerprint(config)["sliding_window"] is None
