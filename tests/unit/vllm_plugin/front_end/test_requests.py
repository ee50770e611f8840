"""Checks of requests with a prefix. `integration/serving/test_requests.py` sends such requests to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_plugin import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.front_end import requests
from vllm_plugin.request_errors import PrefixUnavailableError


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


@pytest.mark.parametrize(("n", "num_engines", "takes_over"), [(1, 1, True), (2, 1, True), (1, 2, True), (2, 2, False)])
def test_choices_in_several_engines_take_over_nothing(n: int, num_engines: int, takes_over: bool) -> None:
    """Each engine lets one request take over what another server prefilled, and knows nothing of the others."""
    from vllm import SamplingParams

    transfer = {"do_remote_prefill": True, "remote_block_ids": [[1]]}
    params = SamplingParams(n=n, extra_args={"kv_transfer_params": transfer})
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2])
    spec = PrefixSpec(name="p7", source="", path="", num_virtual_tokens=7, digest="1")
    requests.attach_prefix(request, spec, 512, num_engines)
    sent = request.sampling_params.extra_args["kv_transfer_params"]
    assert (sent["do_remote_prefill"], sent["remote_block_ids"]) == (takes_over, [[1]])
    assert transfer["do_remote_prefill"]


def test_prefixes_are_unknown_to_an_engine_without_them() -> None:
    class Config:
        kv_transfer_config = None

    with pytest.raises(ValueError, match="this engine has: none"):
        requests.adapter_named(PrefixAdapterRequest("p7"), Config())


OLD, NEW = (PrefixSpec(name="a", source="", path="", num_virtual_tokens=7, digest=digest) for digest in ("old", "new"))


class Engine:
    """Fails to read some prefixes, after a number of outputs."""

    def __init__(self, unreadable: str, after: int = 0) -> None:
        self.unreadable, self.after = unreadable, after
        self.closed = 0

    async def generate(self, spec: PrefixSpec) -> Any:
        try:
            for number in range(3):
                failed = spec.digest in self.unreadable and number == self.after
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(finish_reason="error" if failed else None, text=spec.digest)]
                )
        finally:
            self.closed += 1

    def ask(self, look_again: Any, **options: Any) -> list[str]:
        async def main() -> list[str]:
            outputs = requests.outputs_of(self.generate, OLD, look_again, **options)
            return [output.outputs[0].text async for output in outputs]

        return asyncio.run(main())


async def replaced(spec: PrefixSpec) -> PrefixSpec:
    assert spec is OLD
    return NEW


async def not_replaced(spec: PrefixSpec) -> None:
    return None


def test_a_prefix_that_was_replaced_before_it_was_read() -> None:
    engine = Engine("old")
    assert engine.ask(replaced) == ["new"] * 3
    assert engine.closed == 2
    assert Engine("").ask(replaced) == ["old"] * 3


def test_a_prefix_that_was_being_written_when_it_was_read() -> None:
    engine = Engine("old")

    async def is_whole_now(spec: PrefixSpec) -> PrefixSpec:
        engine.unreadable = ""
        return spec

    assert engine.ask(is_whole_now) == ["old"] * 3
    assert engine.closed == 2


async def the_same(spec: PrefixSpec) -> PrefixSpec:
    return spec


@pytest.mark.parametrize(
    ("engine", "look_again"),
    [
        (Engine("old"), not_replaced),
        (Engine("old"), None),
        # Once: files that change all the time are no reason to go on for ever.
        (Engine("old new"), replaced),
        (Engine("old"), the_same),
        # An answer is of one prefix.
        (Engine("old", after=1), replaced),
    ],
)
def test_a_prefix_that_cannot_be_read(engine: Engine, look_again: Any) -> None:
    with pytest.raises(PrefixUnavailableError, match="'a' could not be read into the cache"):
        engine.ask(look_again)


def test_what_another_server_prefilled_cannot_be_loaded() -> None:
    with pytest.raises(PrefixUnavailableError, match="What another server prefilled for this request"):
        Engine("old").ask(None, handed_over=True)
