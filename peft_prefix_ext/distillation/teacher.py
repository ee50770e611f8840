"""The teacher: the base model with the context before each question, whose answers are stored once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.distillation.targets import Target, append_targets, read_targets
from peft_prefix_ext.generation.generator import Generator, TopLogprobs, text_of
from peft_prefix_ext.generation.prompts import prompt_ids

TEACHER = "teacher"
# Questions that are answered between two writes: what a killed run loses at most.
PART = 32


def answer_questions(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    questions: Sequence[Question],
    settings: DistillationSettings,
    path: Path,
) -> list[Target]:
    """Returns the teacher's answers, and goes on where an earlier run stopped.

    Args:
        generator: The base model, with the compiled context as the prefix `TEACHER`.
        tokenizer: Its tokenizer.
        context: The context.
        questions: The questions.
        settings: The settings.
        path: The file of the answers.

    Raises:
        ValueError: If the base model answers all questions the same without the context, or says nothing.
    """
    done = {target.number: target for target in read_targets(path)}
    missing = [number for number in range(len(questions)) if number not in done]
    for start in tqdm(range(0, len(missing), PART), desc="Targets", disable=not missing):
        part = missing[start : start + PART]
        targets = _answer(generator, tokenizer, context, {number: questions[number] for number in part}, settings)
        append_targets(path, targets)
        done |= {target.number: target for target in targets}
    return used_targets(done.values())


def used_targets(targets: Iterable[Target]) -> list[Target]:
    """Returns the targets to train on, by the numbers of their questions.

    Raises:
        ValueError: If there are none.
    """
    ordered = sorted(targets, key=lambda target: target.number)
    used = [target for target in ordered if target.is_used]
    if not used:
        raise ValueError(
            f"The base model answers all {len(ordered)} questions the same with and without the context, or not at all: "
            "there is nothing to distil; use a larger model, or other questions."
        )
    return used


def _answer(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    questions: dict[int, Question],
    settings: DistillationSettings,
) -> list[Target]:
    prompts = {
        number: prompt_ids(tokenizer, question.messages, context.chat_template)
        for number, question in questions.items()
    }
    alone = {number: prompt_ids(tokenizer, question.messages) for number, question in questions.items()}
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    answers = dict(zip(prompts, generator.generate(list(prompts.values()), prefix=TEACHER, **options), strict=True))
    # Sampled answers differ in any case; greedy ones say whether the context matters.
    greedy = {**options, "temperature": 0.0}
    compared = answers
    if settings.temperature > 0:
        compared = dict(zip(prompts, generator.generate(list(prompts.values()), prefix=TEACHER, **greedy), strict=True))
    without = dict(zip(alone, generator.generate(list(alone.values()), **greedy), strict=True))
    used = [
        number
        for number, answer in answers.items()
        if text_of(tokenizer, answer) and text_of(tokenizer, compared[number]) != text_of(tokenizer, without[number])
    ]
    scores = generator.score(
        [prompts[number] for number in used],
        [answers[number] for number in used],
        top_k=settings.top_k,
        prefix=TEACHER,
    )
    tops = dict(zip(used, scores, strict=True))
    nothing = TopLogprobs([], [], [])
    return [
        Target.of(number, question, prompts[number], answers[number], tops.get(number, nothing))
        for number, question in questions.items()
    ]
