"""Requests of fixed length with random prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptRequest:
    """One request.

    Args:
        prompt: Token ids, including those of a text prefix.
        adapter: The name of the adapter; None for the base model.
    """

    prompt: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class Workload:
    """A batch of requests of the same length.

    Args:
        num_requests: The number of requests, sent at once.
        input_tokens: Prompt tokens, without the prefix.
        output_tokens: Tokens of each answer; the end-of-sequence token is ignored.
        vocab_size: Prompt tokens are drawn uniformly from that many ids.
    """

    num_requests: int
    input_tokens: int
    output_tokens: int
    vocab_size: int

    def requests(
        self, seed: str, adapters: Sequence[str | None] = (None,), prefix: Sequence[int] = ()
    ) -> list[PromptRequest]:
        """Returns requests with new random prompts, which are in no cache.

        Args:
            seed: The seed of the prompts.
            adapters: Used in turn: each once before any is used again.
            prefix: Token ids in front of every prompt.
        """
        rng = random.Random(seed)
        names: list[str | None] = []
        while len(names) < self.num_requests:
            names += rng.sample(adapters, min(len(adapters), self.num_requests - len(names)))
        return [PromptRequest([*prefix, *self.tokens(rng, self.input_tokens)], name) for name in names]

    def tokens(self, rng: random.Random, number: int) -> list[int]:
        return [rng.randrange(self.vocab_size) for _ in range(number)]
