"""Loads prefixes into the cache before their first request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.requests import FixedRequest, outputs_of
from vllm_plugin.request_errors import PrefixUnavailableError

_MAX_CONCURRENT = 64


async def warm_up(engine: Any, specs: Sequence[PrefixSpec]) -> None:
    """Runs one request of one token per prefix on each data-parallel engine of this server.

    Args:
        engine: vLLM's `AsyncLLM`.
        specs: The prefixes.

    Raises:
        PrefixServeError: If the engine could not load one of them.
    """
    parallel = engine.vllm_config.parallel_config
    num_ranks = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    ranks = range(num_ranks) if num_ranks > 1 else [None]
    limit = asyncio.Semaphore(_MAX_CONCURRENT)

    async def run(spec: PrefixSpec, rank: int | None) -> None:
        async with limit:
            outputs = engine.generate(
                {"type": "token", "prompt_token_ids": [0]},
                SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
                f"prefix-warmup-{uuid.uuid4().hex}",
                # Of this content, whatever becomes of its files.
                lora_request=FixedRequest(lora_name=spec.name, spec=spec),
                data_parallel_rank=rank,
            )
            try:
                async for _ in outputs_of(lambda _: outputs, spec):
                    pass
            except PrefixUnavailableError as error:
                raise PrefixServeError(
                    f"Prefix adapter {spec.name!r} could not be read into the cache; the engine's log says why."
                ) from error

    await asyncio.gather(*(run(spec, rank) for spec in specs for rank in ranks))
