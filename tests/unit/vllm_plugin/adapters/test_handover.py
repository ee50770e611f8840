"""Blocks of another server are taken over only with the same prefix on both."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_plugin.adapters import handover
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.front_end import requests

ONE = PrefixSpec("one", "", "/one", 7, "1" * 64)
OTHER = dataclasses.replace(ONE, digest="2" * 64)
DRAFTED = dataclasses.replace(ONE, draft=OTHER)
ON_LORA = dataclasses.replace(ONE, lora_path="/lora", lora_digest="3" * 64)
# As the NixlConnector answers.
HANDED_OVER = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2]]}
TO_PREFILL = {"do_remote_prefill": False, "do_remote_decode": True, "remote_block_ids": None}


def answer(spec: PrefixSpec | None) -> dict[str, Any]:
    """Returns what a server that prefilled answers, as the router gets it."""
    return json.loads(json.dumps({**HANDED_OVER, **({} if spec is None else handover.say(spec))}))


def check(spec: PrefixSpec | None, transfer: dict[str, Any]) -> None:
    prompt = requests.Prompt(num_tokens=5, cache_salt=None, has_embeds=False, has_media=False)
    requests.check(spec, prompt, SamplingParams(extra_args={"kv_transfer_params": transfer}), 512)


@pytest.mark.parametrize("spec", [None, ONE, OTHER, DRAFTED, ON_LORA])
def test_the_same_on_both_servers(spec: PrefixSpec | None) -> None:
    check(spec, answer(spec))
    # Its folder, and where the operator found it, are each server's own.
    if spec is not None:
        check(dataclasses.replace(spec, path="/elsewhere", source="elsewhere"), answer(spec))


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        (None, ONE, "used a prefix adapter, and this one does not"),
        (ONE, None, "did not use the prefix adapter 'one'"),
        (ONE, OTHER, "has another prefix adapter of the name 'one'"),
        (ONE, DRAFTED, "has another prefix adapter"),
        (DRAFTED, ONE, "has another prefix adapter"),
        (ON_LORA, ONE, "has another prefix adapter"),
    ],
)
def test_another_prefix_there(here: PrefixSpec | None, there: PrefixSpec | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(here, answer(there))
    # It may be sent once more to the server that prefills.
    check(here, {**answer(there), "do_remote_prefill": False, "do_remote_decode": True})


@pytest.mark.parametrize("transfer", [{}, TO_PREFILL, {"do_remote_prefill": False}, handover.say(ONE)])
@pytest.mark.parametrize("spec", [None, ONE])
def test_requests_that_take_over_nothing(spec: PrefixSpec | None, transfer: dict[str, Any]) -> None:
    check(spec, transfer)
