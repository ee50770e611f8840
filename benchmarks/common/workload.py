"""What the engines are asked: requests of fixed lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One request.

    Args:
        prompt: Its token ids, those of a text prefix included.
        adapter: The name of its adapter; None for the base model.
    """

    prompt: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class Workload:
    """Requests that are all as long as one another.

    Args:
        num_requests: How many come at once.
        input_tokens: Real tokens of a prompt, without a prefix.
        output_tokens: Tokens of an answer; it never ends before.
        vocab_size: Prompts are drawn from that many ids, uniformly.
    """

    num_requests: int
    input_tokens: int
    output_tokens: int
    vocab_size: int

    def jobs(self, seed: str, adapters: Sequence[str | None] = (None,), prefix: Sequence[int] = ()) -> list[Job]:
        """Returns requests with new prompts, which no cache holds.

        Args:
            seed: What they are drawn with.
            adapters: As many of these as there are requests, each once before any comes again.
            prefix: Tokens in front of every prompt.
        """
        rng = random.Random(seed)
        names: list[str | None] = []
        while len(names) < self.num_requests:
            names += rng.sample(adapters, min(len(adapters), self.num_requests - len(names)))
        return [Job([*prefix, *self.tokens(rng, self.input_tokens)], name) for name in names]

    def tokens(self, rng: random.Random, number: int) -> list[int]:
        return [rng.randrange(self.vocab_size) for _ in range(number)]
