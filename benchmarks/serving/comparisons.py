"""The settings of the benchmark, the comparisons it makes and the ratios it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import Record

TRANSPORTS = ("offline", "http")
NO_PLUGIN, IDLE, PREFIXES, TRANSFORMERS = "no plugin", "idle plugin", "prefixes", "transformers"
BASE, SAME_ENGINE = "base", ", same engine"
# A second engine without the plugin, as a control: it differs by chance alone.
CONTROL = "no plugin, again"


@dataclass(frozen=True)
class Settings:
    """The settings of all comparisons."""

    model: str
    lengths: tuple[int, ...] = (16, 50, 64, 256, 1024)
    mixes: tuple[int, ...] = (1, 8, 64, 1000)
    mix_tokens: int = 64
    loras: tuple[int, ...] = (1, 8, 64)
    ranks: tuple[int, ...] = (8, 16)
    requests: int = 32
    mix_requests: int = 128
    input_tokens: int = 32
    output_tokens: int = 32
    # Engines are restarted: the speed of an engine varies by a few percent from start to start.
    base_starts: int = 8
    starts: int = 4
    rounds: int = 3
    # For comparisons with LoRA and transformers, which are several times slower; these use one start.
    slow_rounds: int = 3
    concurrency: int = 16
    dtype: str = "bfloat16"
    # vLLM's CPU kernel requires multiples of 32.
    block_size: int = 16 if torch.cuda.is_available() else 32
    cache_gib: int = 2
    # CUDA graphs on a GPU; on a CPU, compilation gains too little.
    enforce_eager: bool = not torch.cuda.is_available()
    load_format: str = "auto"
    threads: int = torch.get_num_threads()

    @property
    def context(self) -> int:
        return max(*self.lengths, self.mix_tokens) + self.input_tokens + self.output_tokens

    def record(self) -> Record:
        """Returns the settings for the results file, with the name of the model instead of its folder."""
        return json.loads(json.dumps({**asdict(self), "model": Path(self.model).name}))


SHORT: dict[str, Any] = {
    **{"lengths": (50, 64), "mixes": (1, 8), "loras": (8,), "ranks": (8,)},
    **{"requests": 16, "mix_requests": 16, "output_tokens": 16, "base_starts": 1, "starts": 1, "slow_rounds": 2},
}


@dataclass(frozen=True)
class Candidate:
    """Requests of one kind on one engine.

    Args:
        name: Its name in the results.
        engine: The name of the engine.
        adapters: The adapters of the requests, used evenly; none for the base model.
        text_tokens: The length of a shared text in front of all prompts.
    """

    name: str
    engine: str
    adapters: tuple[str, ...] = ()
    text_tokens: int = 0


@dataclass(frozen=True)
class Comparison:
    """Candidates that take turns, for a number of rounds after each start of their engines."""

    name: str
    num_requests: int
    starts: int
    rounds: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Ratio:
    """A reported result: the fields of one candidate over those of another."""

    title: str
    ours: str
    theirs: str
    fields: tuple[str, ...] = field(default=("tokens_per_second", "ttft_p50", "itl_p50"))


def prefix_names(length: int, number: int) -> tuple[str, ...]:
    return tuple(f"prefix{length}-{index}" for index in range(number))


def comparisons(settings: Settings, transport: str) -> Iterator[Comparison]:
    """Yields the comparisons of a transport."""
    bases = [Candidate(engine, engine) for engine in (NO_PLUGIN, CONTROL, IDLE, PREFIXES)]
    yield Comparison(BASE, settings.requests, settings.base_starts, settings.rounds, tuple(bases))
    lengths = [
        candidate
        for length in settings.lengths
        for candidate in (
            Candidate(f"text of {length}", NO_PLUGIN, text_tokens=length),
            Candidate(f"text of {length}{SAME_ENGINE}", PREFIXES, text_tokens=length),
            Candidate(f"prefix of {length}", PREFIXES, prefix_names(length, 1)),
        )
    ]
    yield Comparison("lengths", settings.requests, settings.starts, settings.rounds, tuple(lengths))
    mixes = [
        Candidate(count(number, "prefix", "prefixes"), PREFIXES, prefix_names(settings.mix_tokens, number))
        for number in settings.mixes
    ]
    yield Comparison("mixes", settings.mix_requests, settings.starts, settings.rounds, tuple(mixes))
    if transport == "http":
        return
    for number in settings.loras:
        ours = Candidate(count(number, "prefix", "prefixes"), PREFIXES, prefix_names(settings.mix_tokens, number))
        theirs = [
            Candidate(
                f"{count(number, 'LoRA', 'LoRA')} of rank {rank}",
                f"LoRA {rank} {number}",
                tuple(f"lora{rank}-{index}" for index in range(number)),
            )
            for rank in settings.ranks
        ]
        num_requests = max(settings.requests, number)
        yield Comparison(f"LoRA, {number}", num_requests, 1, settings.slow_rounds, (ours, *theirs))
    one = prefix_names(settings.mix_tokens, 1)
    yield Comparison(
        TRANSFORMERS,
        settings.requests,
        1,
        settings.slow_rounds,
        (Candidate("vLLM, 1 prefix", PREFIXES, one), Candidate("PeftModel.generate", TRANSFORMERS, one)),
    )


def ratios(settings: Record, comparison: str) -> list[Ratio]:
    """Returns the ratios that a comparison is for, given the recorded settings."""
    if comparison == BASE:
        titles = {CONTROL: "without the plugin, again", IDLE: "idle plugin", PREFIXES: "beside prefixes"}
        return [Ratio(f"base model, {title} / without the plugin", name, NO_PLUGIN) for name, title in titles.items()]
    if comparison == "lengths":
        return [
            Ratio(
                f"prefix of {length} / cached text of {length}{where}",
                f"prefix of {length}",
                f"text of {length}{where}",
            )
            for where in (SAME_ENGINE, "")
            for length in settings["lengths"]
        ]
    if comparison == "mixes":
        first, *more = [count(number, "prefix", "prefixes") for number in settings["mixes"]]
        return [Ratio(f"{name} / {first}", name, first) for name in more]
    if comparison == TRANSFORMERS:
        title = "vLLM / batched `PeftModel.generate`"
        return [Ratio(title, "vLLM, 1 prefix", "PeftModel.generate", ("tokens_per_second",))]
    number = int(comparison.removeprefix("LoRA, "))
    ours = count(number, "prefix", "prefixes")
    names = [f"{count(number, 'LoRA', 'LoRA')} of rank {rank}" for rank in settings["ranks"]]
    return [Ratio(f"{ours} / {name}", ours, name) for name in names]


def count(number: int, one: str, many: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {one if number == 1 else many}"
