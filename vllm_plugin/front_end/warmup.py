"""Puts prefixes into the cache before anyone waits for them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams

from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.errors import PrefixServeError, unavailable_error_type
from vllm_plugin.front_end.requests import answers

_AT_ONCE = 64


async def warm_up(engine: Any, specs: Sequence[PrefixSpec]) -> None:
    """Runs one request of one token per prefix, on each data-parallel engine that this server talks to.

    Args:
        engine: vLLM's `AsyncLLM`.

    Raises:
        PrefixServeError: If the engine could not load one of them.
    """
    parallel = engine.vllm_config.parallel_config
    num_ranks = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    ranks = range(num_ranks) if num_ranks > 1 else [None]
    turn = asyncio.Semaphore(_AT_ONCE)

    async def run(spec: PrefixSpec, rank: int | None) -> None:
        async with turn:
            outputs = engine.generate(
                {"type": "token", "prompt_token_ids": [0]},
                SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
                f"prefix-warmup-{uuid.uuid4().hex}",
                lora_request=PrefixAdapterRequest(lora_name=spec.name, spec=spec),
                data_parallel_rank=rank,
            )
            try:
                async for _ in answers(outputs, spec):
                    pass
            except unavailable_error_type() as error:
                raise PrefixServeError(
                    f"Prefix adapter {spec.name!r} could not be read into the cache; the engine's log says why."
                ) from error

    await asyncio.gather(*(run(spec, rank) for spec in specs for rank in ranks))
