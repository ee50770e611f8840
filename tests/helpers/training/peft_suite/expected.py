"""Which of PEFT's tests a prefix fails, each with the reason."""

from __future__ import annotations

import re

import pytest

NOTHING_TO_MERGE = "a prefix changes no weight: there is nothing to merge, and `merge_and_unload` says so"
FOLDED = "what is loaded to be used is the K/V that the MLP gave, without the MLP; `is_trainable=True` loads both"
OWN_CONFIG = "an adapter has a copy of the config that it was given, as the docstring of `PrefixExtModel` says and why"

# By the name of the test, as a regular expression of the whole.
ALWAYS = {r"test_merge_layers(_\w+)?": NOTHING_TO_MERGE, r"test_from_pretrained_config_construction": OWN_CONFIG}
WITH_MLP = {r"test_save_pretrained(_\w+)?": FOLDED}


def reason_of(test: pytest.Function) -> str | None:
    """Returns why a test fails; None for one that must pass."""
    has_mlp = test.callspec.params["config_kwargs"].get("reparam") != "none"
    reasons = ALWAYS | (WITH_MLP if has_mlp else {})
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, test.originalname)), None)
