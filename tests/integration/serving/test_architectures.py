"""The trainable architectures in vLLM: served exactly, or refused at the start with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.serving.architectures import Served, forget_engine
from helpers.serving.engines import Pool
from helpers.serving.served import EXACT, REFUSED, SOAK
from vllm_plugin.errors import PrefixServeError


@pytest.fixture
def serve(pool: Pool, tmp_path: Path):
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    served: list[Served] = []

    def start(*args, **settings) -> Served:
        served.append(Served(args[0], tmp_path, *args[1:], **settings))
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAK)])
def test_same_tokens_as_peft_cold_and_warm(name: str, serve: Callable[..., Served]):
    served = serve(name, {**EXACT, **SOAK}[name])
    assert len({tuple(logprobs) for _, logprobs in served.expected}) == len(served.requests)
    served.check()
    served.check()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama4" else pytest.mark.soak) for name in REFUSED]
)
def test_is_refused_at_the_start(name: str, serve: Callable[..., Served]):
    why, config = REFUSED[name]
    with pytest.raises(PrefixServeError, match=why):
        serve(name, config)
