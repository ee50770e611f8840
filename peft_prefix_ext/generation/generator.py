"""What distillation needs of a model: greedy or sampled answers, and the log-probabilities of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

TokenIds = list[int]


@dataclass(frozen=True)
class TopLogprobs:
    """The k most probable tokens at each position of an answer, the most probable first.

    Args:
        ids: Their token ids, `[num_tokens, k]`.
        logprobs: Their log-probabilities, `[num_tokens, k]`.
        answer: The log-probabilities of the answer's own tokens, `[num_tokens]`.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    answer: list[float]


class Generator(Protocol):
    """A base model, with prefixes by name: in transformers (`TransformersGenerator`) or in vLLM (`VLLMGenerator`)."""

    def add_prefix(self, name: str, folder: str | Path) -> None:
        """Loads a prefix under a name, in place of the one that has this name."""

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        prefix: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[TokenIds]:
        """Returns an answer to each prompt.

        Args:
            prompts: The token ids of the prompts, which follow the prefix.
            max_new_tokens: The length of the longest answer, in tokens.
            prefix: The name of the prefix, `None` for the base model alone.
            temperature: 0 for greedy answers.
            seed: The seed of sampled answers.

        Returns:
            The answers, each with the end-of-sequence token that ends it, unless it was cut at `max_new_tokens`.
        """

    def score(
        self, prompts: Sequence[TokenIds], answers: Sequence[TokenIds], *, top_k: int, prefix: str | None = None
    ) -> list[TopLogprobs]:
        """Returns the most probable tokens where each token of each answer stands, given the prompt and the answer so far."""


def pad_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token for padding, which masks hide: any, if the tokenizer has none."""
    found: int | None = tokenizer.pad_token_id
    return 0 if found is None else found


def text_of(tokenizer: PreTrainedTokenizerBase, answer: TokenIds) -> str:
    """Returns an answer as text, without special tokens and the space around it."""
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
