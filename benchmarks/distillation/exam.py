"""An exam: questions that no prefix was trained on, answered behind an opening or a prefix, by three measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from benchmarks.common.results import Record
from peft_prefix_ext.distillation.context import Context, Messages
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.reporting.answers import (
    Answers,
    prompts_behind_prefix,
    prompts_with_opening,
    references_of,
    score_answers,
)
from peft_prefix_ext.distillation.reporting.baselines import opening_length
from peft_prefix_ext.distillation.reporting.metrics import Metric, word_f1
from peft_prefix_ext.distillation.reporting.recovered_share import Score, separation
from peft_prefix_ext.distillation.teacher import TEACHER
from peft_prefix_ext.generation.generator import Generator, TokenIds

# The measures by their names in records, and their titles.
CHOICE, LOGPROB, SCORE = "choice", "logprob", "score"


@dataclass(frozen=True)
class Exam:
    """Questions on a context.

    Args:
        context: The context.
        questions: The questions.
        choices: For each question its right answer first, and then wrong ones; empty where there are none to choose from.
        metric: The score of free answers.
        max_new_tokens: The length of the longest free answer; 0 for none.
    """

    context: Context
    questions: Sequence[Question]
    choices: Sequence[Sequence[str]] = ()
    metric: Metric = word_f1
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Outcome:
    """The measures of one candidate, each a function of the indices of questions.

    Args:
        num_tokens: The tokens before the questions.
        measures: By name.
        num_questions: The number of questions.
    """

    num_tokens: int
    measures: Mapping[str, Score]
    num_questions: int

    def record(self) -> Record:
        """Returns the length and the measures over all questions."""
        means = {name: round(score(range(self.num_questions)), 5) for name, score in self.measures.items()}
        return {"tokens": self.num_tokens, **means}


class Examiner:
    """Asks the questions of an exam.

    Args:
        generator: The base model; it has the exact prefix of the context as "teacher", if a question has no reference.
        tokenizer: Its tokenizer.
        exam: The exam.
    """

    def __init__(self, generator: Generator, tokenizer: PreTrainedTokenizerBase, exam: Exam) -> None:
        self.generator, self.tokenizer, self.exam = generator, tokenizer, exam
        self._behind = prompts_behind_prefix(tokenizer, exam.context, exam.questions)
        own: list[TokenIds] = [[] for _ in exam.questions]
        if any(question.reference is None for question in exam.questions):
            own = self._answers(self._behind, TEACHER)
        self._references = references_of(tokenizer, exam.questions, own)

    def with_opening(self, messages: Messages) -> Outcome:
        """Returns the outcome with the opening of a chat in the prompts, as text."""
        prompts = prompts_with_opening(self.tokenizer, messages, self.exam.questions)
        return self._outcome(prompts, None, opening_length(self.tokenizer, self.exam.context, messages))

    def with_prefix(self, name: str, num_tokens: int) -> Outcome:
        """Returns the outcome behind a prefix that the generator has."""
        return self._outcome(self._behind, name, num_tokens)

    def _outcome(self, prompts: Sequence[TokenIds], prefix: str | None, num_tokens: int) -> Outcome:
        answers = self._answers(prompts, prefix)
        found = score_answers(self.generator, self.tokenizer, prompts, self._references, answers, prefix=prefix)
        measures: dict[str, Score] = {LOGPROB: found.logprob}
        if self.exam.choices:
            measures[CHOICE] = _mean_of(self._choose(prompts, prefix))
        if self.exam.max_new_tokens:
            measures[SCORE] = _score_of(found, self.exam.metric)
        return Outcome(num_tokens, measures, len(self.exam.questions))

    def _answers(self, prompts: Sequence[TokenIds], prefix: str | None) -> list[TokenIds]:
        if not self.exam.max_new_tokens:
            return [[] for _ in prompts]
        return self.generator.generate(prompts, max_new_tokens=self.exam.max_new_tokens, prefix=prefix)

    def _choose(self, prompts: Sequence[TokenIds], prefix: str | None) -> list[float]:
        """Returns 1 for each question whose right answer has the highest mean log-probability per token, 0 for others."""
        pairs = [
            (prompt, self.tokenizer(choice, add_special_tokens=False).input_ids)
            for prompt, choices in zip(prompts, self.exam.choices, strict=True)
            for choice in choices
        ]
        scores = self.generator.score(
            [prompt for prompt, _ in pairs], [choice for _, choice in pairs], top_k=1, prefix=prefix
        )
        means = iter([fmean(score.answer) for score in scores])
        chosen = [[next(means) for _ in choices] for choices in self.exam.choices]
        return [float(right > max(wrong)) for right, *wrong in chosen]


def separations(nothing: Outcome, full: Outcome) -> Record:
    """Returns the 95 % interval of the difference of the full context and nothing, by measure, over which questions are asked."""
    return {
        name: separation(score, full.measures[name], nothing.num_questions).interval
        for name, score in nothing.measures.items()
    }


def _mean_of(values: Sequence[float]) -> Score:
    return lambda indices: fmean(values[index] for index in indices)


def _score_of(answers: Answers, metric: Metric) -> Callable[[Sequence[int]], float]:
    return partial(answers.score, metric)
