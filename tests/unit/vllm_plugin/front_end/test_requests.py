"""Checks of requests with a prefix. `integration/serving/test_requests.py` sends such requests to an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_plugin import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.front_end import requests


def checks() -> list[tuple[Callable[[], requests.Prompt], Callable[[], Any], str]]:
    from vllm import PoolingParams, SamplingParams

    def prompt(**fields: Any) -> Callable[[], requests.Prompt]:
        plain = {"num_tokens": 5, "cache_salt": None, "has_embeds": False, "has_media": False}
        return lambda: requests.Prompt(**{**plain, **fields})

    return [
        (prompt(), PoolingParams, "pooling requests cannot use the prefix adapter 'p7'"),
        (prompt(has_embeds=True), SamplingParams, "`prompt_embeds` are not supported"),
        (prompt(num_tokens=None), SamplingParams, "`prompt_embeds` are not supported"),
        (prompt(num_tokens=0), SamplingParams, "The prompt is empty"),
        (prompt(num_tokens=505), SamplingParams, "has 505 tokens, which with the 7 virtual tokens"),
        (prompt(num_tokens=505, has_media=True), SamplingParams, "has 505 tokens, media included, which with the 7"),
        (
            prompt(),
            lambda: SamplingParams(prompt_logprob_token_ids=[[5, 6]] * 4, max_tokens=1),
            "`prompt_logprob_token_ids` is not supported",
        ),
    ]


@pytest.mark.parametrize(("prompt", "params", "message"), checks())
def test_checks(prompt: Any, params: Any, message: str) -> None:
    spec = PrefixSpec(name="p7", source="", path="", num_virtual_tokens=7, digest="")
    with pytest.raises(ValueError, match=message):
        requests.check(spec, prompt(), params(), 512)


def test_prefixes_are_unknown_to_an_engine_without_them() -> None:
    class Config:
        kv_transfer_config = None

    with pytest.raises(ValueError, match="this engine has: none"):
        requests.adapter_named(PrefixAdapterRequest("p7"), Config())
