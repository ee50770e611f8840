"""A distilled prefix on vLLM, against its full context: as text, as text in the cache, and as its exact prefix."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.interleaving import Measurement, interleave
from benchmarks.common.random_adapters import write_prefixes
from benchmarks.common.workload import PromptRequest, Workload
from benchmarks.distillation.bench import Bench
from benchmarks.distillation.settings import Settings
from benchmarks.serving.offline_engine import Engine, vllm_engine

TASK = "speed"
UNCACHED, CACHED, COMPILED, DISTILLED = "text", "cached text", "compiled", "distilled"
# The fields of a measurement: all requests at once, and then one alone.
RATE, FIRST_ALONE = "tokens_per_second", "ttft_alone"


@dataclass(frozen=True)
class Candidate:
    """How requests get their context.

    Args:
        num_tokens: The length of the context, which is the same text for all requests, or another one for each.
        is_shared: Whether it is the same.
        adapter: The prefix that stands for it, if it is no text.
    """

    num_tokens: int
    is_shared: bool = True
    adapter: str | None = None

    def requests(self, workload: Workload, seed: str) -> list[PromptRequest]:
        """Returns requests with random inputs behind the context."""
        if self.adapter is not None:
            return workload.requests(seed, [self.adapter])
        if self.is_shared:
            return workload.requests(seed, prefix=workload.tokens(random.Random(0), self.num_tokens))
        return replace(workload, input_tokens=workload.input_tokens + self.num_tokens).requests(seed)


def candidates(settings: Settings) -> dict[str, Candidate]:
    """Returns the candidates by name."""
    whole, p = settings.context_tokens, settings.prefix_tokens
    return {
        UNCACHED: Candidate(whole, is_shared=False),
        CACHED: Candidate(whole),
        COMPILED: Candidate(whole, adapter=f"prefix{whole}-0"),
        DISTILLED: Candidate(p, adapter=f"prefix{p}-0"),
    }


def run(bench: Bench) -> None:
    """Lets the candidates take turns on one engine, unless that is recorded."""
    if not bench.is_missing(task=TASK):
        return
    settings = bench.settings
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.speed_dtype))
    bench.add(task=TASK, measurements=measure(settings, base))


def measure(settings: Settings, base: PreTrainedModel, **options: Any) -> dict[str, list[Measurement]]:
    """Lets the candidates take turns on one engine.

    Args:
        settings: The settings.
        base: The model, for which random prefixes are written: what they hold does not affect speed.
        options: Arguments of `LLM` that differ.

    Returns:
        The measurements of each candidate, by round.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefixes = {
            **write_prefixes(Path(folder), base, settings.prefix_tokens, 1),
            **write_prefixes(Path(folder), base, settings.context_tokens, 1),
        }
        vocabulary = AutoConfig.from_pretrained(settings.model).get_text_config().vocab_size
        workload = Workload(settings.requests, settings.input_tokens, settings.output_tokens, vocabulary)
        with Engine(vllm_engine, {**_engine_arguments(settings), **options}, prefixes) as engine:
            found = candidates(settings)
            for candidate in found.values():
                # One request fills the cache before the measurement.
                engine.run(candidate.requests(replace(workload, num_requests=1), "warm-up"), 1)
            return interleave(
                {name: _measurement(engine, workload, name, candidate) for name, candidate in found.items()},
                settings.speed_rounds,
            )


def _measurement(engine: Engine, workload: Workload, name: str, candidate: Candidate) -> Callable[[], Measurement]:
    rounds = iter(range(sys.maxsize))

    def take_turn() -> Measurement:
        number = next(rounds)
        together = engine.run(candidate.requests(workload, f"{name} {number}"), workload.output_tokens)
        one = replace(workload, num_requests=1)
        alone = engine.run(candidate.requests(one, f"{name} {number}, alone"), workload.output_tokens)
        return {**together, FIRST_ALONE: alone["ttft_p50"]}

    return take_turn


def _engine_arguments(settings: Settings) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "model": settings.model,
        "dtype": settings.speed_dtype,
        "block_size": settings.block_size,
        "max_model_len": settings.context_tokens + settings.input_tokens + settings.output_tokens,
        "max_num_seqs": settings.requests,
        "kv_cache_memory_bytes": settings.cache_gib << 30,
        "enforce_eager": not has_gpu,
        **({"gpu_memory_utilization": 0.5} if has_gpu else {}),
    }
