"""What a context costs each request: as text, as text that the cache holds, and as a short prefix."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.generation.generator import Generator, TokenIds


@dataclass(frozen=True)
class Candidate:
    """One way to give a request its context.

    Args:
        name: Its name in the report.
        num_tokens: The length of the context in this form.
        num_bytes: The size of its keys, values and states.
        prompts: What requests send.
        prefix: The name of the prefix before them.
        is_cached: Whether an engine may find the prompts in its cache from one measurement to the next.
    """

    name: str
    num_tokens: int
    num_bytes: int
    prompts: Sequence[TokenIds]
    prefix: str | None = None
    is_cached: bool = True


@dataclass(frozen=True)
class Cost:
    """What a candidate costs, measured.

    Args:
        name: Its name in the report.
        num_tokens: The length of the context in this form.
        num_bytes: The size of its keys, values and states.
        first_token_seconds: The seconds until the first token of one request.
        tokens_per_second: The tokens per second of several requests at once, from their prompts to their ends.
    """

    name: str
    num_tokens: int
    num_bytes: int
    first_token_seconds: float
    tokens_per_second: float


def measure_costs(
    generator: Generator,
    candidates: Sequence[Candidate],
    *,
    num_requests: int = 8,
    max_new_tokens: int = 32,
    repetitions: int = 3,
) -> list[Cost]:
    """Measures candidates in turns, so that a machine that slows down does so for all; medians, after one warm-up round.

    Args:
        generator: The base model, with the prefixes.
        candidates: What to measure; each has at least one prompt.
        num_requests: How many requests run at once where tokens per second are measured.
        max_new_tokens: The length of the longest of their answers.
        repetitions: How often each is measured.
    """
    first: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    rates: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(1 + repetitions):
        for candidate in candidates:
            prompts = [
                candidate.prompts[(number + index) % len(candidate.prompts)] for index in range(1 + num_requests)
            ]
            if not candidate.is_cached:
                prompts = [unlike_any_before(prompt) for prompt in prompts]
            seconds, _ = _timed(generator, prompts[:1], 1, candidate.prefix)
            batch_seconds, num_generated = _timed(generator, prompts[1:], max_new_tokens, candidate.prefix)
            if number:
                first[candidate.name].append(seconds)
                rates[candidate.name].append(num_generated / batch_seconds)
    return [
        Cost(each.name, each.num_tokens, each.num_bytes, median(first[each.name]), median(rates[each.name]))
        for each in candidates
    ]


def requests_until_paid(seconds_spent: float, text: Cost, prefix: Cost) -> float | None:
    """Returns after how many requests a prefix has saved the time that it took to make, `None` if it saves none.

    What counts is the time to the first token, against the text in the prompt that no cache holds.

    Args:
        seconds_spent: The time that the prefix took to make.
        text: The cost of the text, uncached.
        prefix: The cost of the prefix.
    """
    saved = text.first_token_seconds - prefix.first_token_seconds
    return seconds_spent / saved if saved > 0 else None


def size_at_length(prefix: PrefixCheckpoint, num_tokens: int) -> int:
    """Returns the bytes that a prefix of the same model and dtype has at another length: states have no length."""
    kv = sum(tensor.nbytes for layer in prefix.layers.values() for tensor in layer)
    return kv // prefix.num_virtual_tokens * num_tokens + prefix.num_bytes - kv


def unlike_any_before(prompt: TokenIds) -> TokenIds:
    """Returns a prompt of the same length with another start, for which an engine's prefix cache has no block."""
    draws = random.SystemRandom()
    return [*draws.choices(prompt, k=min(4, len(prompt))), *prompt[4:]]


def _timed(
    generator: Generator, prompts: Sequence[TokenIds], max_new_tokens: int, prefix: str | None
) -> tuple[float, int]:
    """Returns the seconds that the answers take, and the number of their tokens."""
    start = time.perf_counter()
    answers = generator.generate(prompts, max_new_tokens=max_new_tokens, prefix=prefix)
    return time.perf_counter() - start, sum(map(len, answers))
