"""The report stage: everything that `report.py` says, measured on one generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.checkpoint.context import text_hash
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.reporting.answers import (
    Answers,
    prompts_behind_prefix,
    prompts_with_opening,
    references_of,
    score_answers,
)
from peft_prefix_ext.distillation.reporting.baselines import Opening, baseline_openings, opening_length
from peft_prefix_ext.distillation.reporting.costs import (
    Candidate,
    Cost,
    measure_costs,
    requests_until_paid,
    size_at_length,
)
from peft_prefix_ext.distillation.reporting.drift import Drift, answer_off_topic, measure_drift
from peft_prefix_ext.distillation.reporting.metrics import Metric, word_f1
from peft_prefix_ext.distillation.reporting.recovered_share import separation
from peft_prefix_ext.distillation.reporting.report import FULL, Report, Row
from peft_prefix_ext.distillation.teacher import TEACHER
from peft_prefix_ext.generation.generator import Generator, TokenIds

STUDENT = "student"
# Of the answers whose tokens per second are measured.
_TIMED_TOKENS = 32


def evaluate(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    questions: Sequence[Question],
    students: Mapping[str, Sequence[str | Path]],
    *,
    metric: Metric = word_f1,
    metric_name: str = "word F1",
    max_new_tokens: int = 64,
    seconds_spent: float | None = None,
    num_requests: int = 8,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Compares prefixes with their whole context, with nothing, and with what else has their length.

    Args:
        generator: The base model. It has the exact prefix of the context as "teacher"; each student is loaded as "student".
        tokenizer: Its tokenizer.
        context: The opening of a chat, which the prefixes stand for.
        questions: Questions that no prefix was trained on.
        students: The folders of the prefixes by the name of their row, those of several seeds under one name. All have the
            same length, which is that of everything they are compared with.
        metric: The score of answers, given their references; the higher the better. It is called on resampled questions, too.
        metric_name: Its name in the report.
        max_new_tokens: The length of the longest answer.
        seconds_spent: The time that one prefix took to make.
        num_requests: How many requests run at once where tokens per second are measured.
        seed: The seed of what is drawn: chunks of the text and resampled questions.
        settings: What else belongs into the report.

    Raises:
        ValueError: If there are no questions or no students, if the students differ in length, or if the context is not the
            opening of a chat.
    """
    prefixes = {name: [read_prefix(folder) for folder in folders] for name, folders in students.items()}
    p = _common_length(prefixes)
    if not questions:
        raise ValueError("There are no questions to evaluate with: give at least one that was not trained on.")
    openings = baseline_openings(generator, tokenizer, context, p, teacher=TEACHER, seed=seed)
    behind = prompts_behind_prefix(tokenizer, context, questions)

    def answers_to(prompts: Sequence[TokenIds], prefix: str | None) -> list[TokenIds]:
        return generator.generate(prompts, max_new_tokens=max_new_tokens, prefix=prefix)

    own = answers_to(behind, TEACHER)
    references = references_of(tokenizer, questions, own)

    def evaluated(prompts: Sequence[TokenIds], prefix: str | None = None) -> Answers:
        answers = own if prefix == TEACHER else answers_to(prompts, prefix)
        return score_answers(generator, tokenizer, prompts, references, answers, prefix=prefix)

    def with_opening(opening: Opening) -> tuple[Row, Answers]:
        found = evaluated(prompts_with_opening(tokenizer, opening.messages, questions))
        length = opening_length(tokenizer, context, opening.messages)
        return _row(opening.name, length, [found], metric), found

    (nothing_row, nothing), *others = map(with_opening, openings)
    full = evaluated(behind, TEACHER)
    rows = [
        nothing_row,
        _row(FULL, len(context.token_ids), [full], metric),
        *(row for row, _ in others),
    ]
    off_topic = answer_off_topic(generator, tokenizer)
    drift_of = partial(measure_drift, generator, tokenizer, off_topic, chat_template=context.chat_template)
    drift: dict[str, list[Drift]] = {FULL: [drift_of(prefix=TEACHER)]}
    for name, checkpoints in prefixes.items():
        found: list[Answers] = []
        drift[name] = []
        for checkpoint in checkpoints:
            generator.add_prefix(STUDENT, checkpoint.path)
            found.append(evaluated(behind, STUDENT))
            drift[name].append(drift_of(prefix=STUDENT))
        rows.append(_row(name, p, found, metric, is_prefix=True))

    last = list(prefixes.values())[-1][-1]  # they all have the same size
    costs = _costs(generator, context, behind, last, num_requests, min(max_new_tokens, _TIMED_TOKENS))
    return Report(
        rows=rows,
        metric=metric_name,
        score=separation(partial(nothing.score, metric), partial(full.score, metric), len(questions), seed=seed),
        logprob=separation(nothing.logprob, full.logprob, len(questions), seed=seed),
        questions=[str(question.messages[-1]["content"]) for question in questions],
        references=references.texts,
        num_own_references=references.num_own,
        drift=drift,
        costs=costs,
        seconds_spent=seconds_spent,
        requests_until_paid=None if seconds_spent is None else requests_until_paid(seconds_spent, costs[0], costs[-1]),
        sources={
            **context.sources,
            "chat template": text_hash(str(tokenizer.get_chat_template())),
        },
        settings={"seed": seed, "longest answer": f"{max_new_tokens} tokens", **(settings or {})},
    )


def _row(name: str, num_tokens: int, found: Sequence[Answers], metric: Metric, *, is_prefix: bool = False) -> Row:
    scores = [each.score(metric) for each in found]
    return Row(name, num_tokens, scores, [each.logprob() for each in found], found[0].texts, is_prefix)


def _common_length(prefixes: Mapping[str, Sequence[PrefixCheckpoint]]) -> int:
    lengths = {checkpoint.num_virtual_tokens for checkpoints in prefixes.values() for checkpoint in checkpoints}
    if not lengths or not all(prefixes.values()):
        raise ValueError("There is no prefix to evaluate: give at least one folder for each name.")
    if len(lengths) > 1:
        raise ValueError(
            f"The prefixes have {' and '.join(map(str, sorted(lengths)))} virtual tokens: make a report for each length."
        )
    return lengths.pop()


def _costs(
    generator: Generator,
    context: Context,
    prompts: Sequence[TokenIds],
    student: PrefixCheckpoint,
    num_requests: int,
    max_new_tokens: int,
) -> list[Cost]:
    """Returns what the context costs as text, the same in the cache, and the student that is loaded."""
    whole = len(context.token_ids)
    size = size_at_length(student, whole)
    texts = [[*context.token_ids, *prompt] for prompt in prompts]
    candidates = [
        Candidate(f"{FULL}, as text", whole, size, texts, is_cached=False),
        Candidate(f"{FULL}, cached", whole, size, prompts, TEACHER),
        Candidate("prefix", student.num_virtual_tokens, student.num_bytes, prompts, STUDENT),
    ]
    return measure_costs(generator, candidates, num_requests=num_requests, max_new_tokens=max_new_tokens)
