"""Drift: how far a prefix moves the base model on what has nothing to do with its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.generation.generator import Generator, TokenIds
from peft_prefix_ext.generation.prompts import prompt_ids

# Everyday requests of many kinds, none of which a context is likely to be about.
PROMPTS = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Explain photosynthesis in two sentences.",
    "What is 17 times 6?",
    "Translate into Spanish: Good morning, my friend.",
    "Give me three ideas for a birthday present.",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "How can I sleep better at night?",
    "Correct the grammar: She go to school yesterday.",
    "What is the difference between a virus and a bacterium?",
    "List five animals that live in the desert.",
    "Write a polite email that declines an invitation.",
    "Why is the sky blue?",
    "Tell me a joke about computers.",
)
_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class OffTopic:
    """The base model's own answers to `PROMPTS`.

    Args:
        answers: The greedy answers, of at most 64 tokens.
        logprobs: The base's log-probability of each of their tokens, one list per answer.
    """

    answers: list[TokenIds]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Drift:
    """How a prefix takes the base's own answers to unrelated prompts, token by token.

    Args:
        logprob_difference: The mean absolute difference between the log-probabilities of a token with the prefix and in the
            base, in nats. 0 means no drift.
        same_token: The share of the tokens which the most probable token with the prefix is, too. 1 means that the base's
            answers stay as they are.
    """

    logprob_difference: float
    same_token: float


def answer_off_topic(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> OffTopic:
    """Returns the answers of the base model alone, which `measure_drift` compares with."""
    prompts = _prompts(tokenizer)
    answers = generator.generate(prompts, max_new_tokens=_ANSWER_TOKENS)
    scores = generator.score(prompts, answers, top_k=1)
    return OffTopic(answers, [score.answer for score in scores])


def measure_drift(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    off_topic: OffTopic,
    prefix: str,
    chat_template: str | None,
) -> Drift:
    """Measures the drift of a prefix on every token of the base's answers; all tokens count the same.

    Args:
        generator: The base model with the prefix.
        tokenizer: Its tokenizer.
        off_topic: What `answer_off_topic` returned for the same model.
        prefix: The name of the prefix.
        chat_template: The chat template behind the prefix.
    """
    scores = generator.score(_prompts(tokenizer, chat_template), off_topic.answers, top_k=1, prefix=prefix)
    differences: list[float] = []
    same: list[bool] = []
    for score, answer, logprobs in zip(scores, off_topic.answers, off_topic.logprobs, strict=True):
        differences += [abs(ours - theirs) for ours, theirs in zip(score.answer, logprobs, strict=True)]
        same += [best[0] == token for best, token in zip(score.ids, answer, strict=True)]
    return Drift(sum(differences) / len(differences), sum(same) / len(same))


def _prompts(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> Sequence[TokenIds]:
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}], chat_template) for text in PROMPTS]
