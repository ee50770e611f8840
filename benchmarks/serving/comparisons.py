"""What is compared with what, by `serving.py`, and under which settings."""

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
# How far two engines that are the same are apart.
CONTROL = "no plugin, again"


@dataclass(frozen=True)
class Settings:
    """What decides how fast things are, beside the machine."""

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
    # The same engine is a few percent faster or slower each time it is started.
    base_starts: int = 8
    starts: int = 4
    rounds: int = 3
    # Of comparisons with what takes several times as long, which are made with one start.
    slow_rounds: int = 3
    concurrency: int = 16
    dtype: str = "bfloat16"
    # vLLM's kernel for CPUs takes multiples of 32.
    block_size: int = 16 if torch.cuda.is_available() else 32
    cache_gib: int = 2
    # On a CPU it compiles nothing worth waiting for; on a GPU it is CUDA graphs.
    enforce_eager: bool = not torch.cuda.is_available()
    load_format: str = "auto"
    threads: int = torch.get_num_threads()

    @property
    def context(self) -> int:
        return max(*self.lengths, self.mix_tokens) + self.input_tokens + self.output_tokens

    def record(self) -> Record:
        """Returns the settings as they stand in the results: the name of the model, not its folder."""
        return json.loads(json.dumps({**asdict(self), "model": Path(self.model).name}))


SHORT: dict[str, Any] = {
    **{"lengths": (50, 64), "mixes": (1, 8), "loras": (8,), "ranks": (8,)},
    **{"requests": 16, "mix_requests": 16, "output_tokens": 16, "base_starts": 1, "starts": 1, "slow_rounds": 2},
}


@dataclass(frozen=True)
class Candidate:
    """One thing that is measured.

    Args:
        name: How it is called in the results.
        engine: Where it runs.
        adapters: The names that requests choose from, evenly; none for the base model.
        text_tokens: Length of a text in front of all prompts.
    """

    name: str
    engine: str
    adapters: tuple[str, ...] = ()
    text_tokens: int = 0


@dataclass(frozen=True)
class Comparison:
    """Candidates that take turns, in so many rounds of each start of their engines."""

    name: str
    num_requests: int
    starts: int
    rounds: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Ratio:
    """What a result is: a field of one candidate over that of another."""

    title: str
    ours: str
    theirs: str
    fields: tuple[str, ...] = field(default=("tokens_per_second", "ttft_p50", "itl_p50"))


def prefix_names(length: int, number: int) -> tuple[str, ...]:
    return tuple(f"prefix{length}-{index}" for index in range(number))


def comparisons(settings: Settings, transport: str) -> Iterator[Comparison]:
    """Yields what is compared, such that neighbours share engines."""
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
        Candidate(_title(number, "prefix", "prefixes"), PREFIXES, prefix_names(settings.mix_tokens, number))
        for number in settings.mixes
    ]
    yield Comparison("mixes", settings.mix_requests, settings.starts, settings.rounds, tuple(mixes))
    if transport == "http":
        return
    for number in settings.loras:
        ours = Candidate(_title(number, "prefix", "prefixes"), PREFIXES, prefix_names(settings.mix_tokens, number))
        theirs = [
            Candidate(
                f"{_title(number, 'LoRA', 'LoRA')} of rank {rank}",
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
    """Returns the results that a comparison is made for, out of the settings as they were recorded."""
    if comparison == BASE:
        titles = {CONTROL: "without the plugin, too", IDLE: "idle plugin", PREFIXES: "beside prefixes"}
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
        first, *more = [_title(number, "prefix", "prefixes") for number in settings["mixes"]]
        return [Ratio(f"{name} / {first}", name, first) for name in more]
    if comparison == TRANSFORMERS:
        title = "vLLM / batched `PeftModel.generate`"
        return [Ratio(title, "vLLM, 1 prefix", "PeftModel.generate", ("tokens_per_second",))]
    number = int(comparison.removeprefix("LoRA, "))
    ours = _title(number, "prefix", "prefixes")
    names = [f"{_title(number, 'LoRA', 'LoRA')} of rank {rank}" for rank in settings["ranks"]]
    return [Ratio(f"{ours} / {name}", ours, name) for name in names]


def _title(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
