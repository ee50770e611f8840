"""Answers to held-out questions by free generation, and how probable the right answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.distillation.context import Context, Messages
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.reporting.metrics import Metric
from peft_prefix_ext.generation.generator import Generator, TokenIds, text_of
from peft_prefix_ext.generation.prompts import prompt_ids


@dataclass(frozen=True)
class References:
    """The right answers to questions.

    Args:
        texts: As texts, by question.
        token_ids: As tokens.
        num_own: How many of them are the full context's own answers, in want of others.
    """

    texts: list[str]
    token_ids: list[TokenIds]
    num_own: int


@dataclass(frozen=True)
class Answers:
    """What the model says with one prefix, or with one opening.

    Args:
        texts: The greedy answers, by question.
        references: The right answers.
        logprobs: The mean log-probability per token of each right answer, in nats.
    """

    texts: list[str]
    references: list[str]
    logprobs: list[float]

    def score(self, metric: Metric, indices: Sequence[int] | None = None) -> float:
        """Returns the metric over all questions, or over some, by index."""
        chosen = range(len(self.texts)) if indices is None else indices
        return float(metric([self.texts[index] for index in chosen], [self.references[index] for index in chosen]))

    def logprob(self, indices: Sequence[int] | None = None) -> float:
        """Returns the mean of `logprobs` over all questions, or over some, by index."""
        return fmean(self.logprobs if indices is None else [self.logprobs[index] for index in indices])


def prompts_behind_prefix(
    tokenizer: PreTrainedTokenizerBase, context: Context, questions: Sequence[Question]
) -> list[TokenIds]:
    """Returns the prompts of questions behind a prefix that stands for a context."""
    return [prompt_ids(tokenizer, question.messages, context.chat_template) for question in questions]


def prompts_with_opening(
    tokenizer: PreTrainedTokenizerBase, opening: Messages, questions: Sequence[Question]
) -> list[TokenIds]:
    """Returns the prompts of questions behind the opening of a chat, as text."""
    return [prompt_ids(tokenizer, [*opening, *question.messages]) for question in questions]


def references_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], own_answers: Sequence[TokenIds]
) -> References:
    """Returns the right answers: those that the questions bring, else the full context's own.

    Args:
        tokenizer: The tokenizer.
        questions: The questions.
        own_answers: The answers with the full context, by question.
    """
    texts: list[str] = []
    token_ids: list[TokenIds] = []
    num_own = 0
    for question, own in zip(questions, own_answers, strict=True):
        given = (question.reference or "").strip()
        num_own += not given
        texts.append(given or text_of(tokenizer, own))
        token_ids.append(list(tokenizer(given, add_special_tokens=False).input_ids) if given else list(own))
    return References(texts, token_ids, num_own)


def score_answers(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    references: References,
    answers: Sequence[TokenIds],
    *,
    prefix: str | None = None,
) -> Answers:
    """Returns answers as texts, with the log-probabilities of the references.

    Args:
        generator: The base model, with its prefixes.
        tokenizer: Its tokenizer.
        prompts: The prompt of each question.
        references: The right answers.
        answers: The greedy answers to the prompts, by `generator.generate`.
        prefix: The name of the prefix before the prompts, `None` for none.
    """
    scores = generator.score(prompts, references.token_ids, top_k=1, prefix=prefix)
    logprobs = [fmean(score.answer) for score in scores]
    return Answers([text_of(tokenizer, answer) for answer in answers], references.texts, logprobs)
