"""On-policy distillation: the student answers, and learns from what the teacher says of its answers (arXiv 2306.13649).

A student that has only seen the teacher's answers does not know how to go on after a mistake of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from peft_prefix_ext.distillation.settings import DistillationSettings
from peft_prefix_ext.distillation.targets import Target
from peft_prefix_ext.distillation.teacher import TEACHER
from peft_prefix_ext.generation.generator import Generator

QUESTIONS_PER_ROUND = 64


def score_own_answers(
    generator: Generator,
    student: str,
    targets: Sequence[Target],
    settings: DistillationSettings,
    number: int,
    seed: int,
) -> list[Target]:
    """Returns the student's answers to some questions, with what the teacher says at each of their tokens.

    Args:
        generator: The base model with the teacher and the student.
        student: The name of the student in `generator`.
        targets: The questions, with answers that are not used.
        settings: The settings.
        number: The number of the round.
        seed: The seed of the student.
    """
    own = 1_000 * (seed + 1) + number
    chosen = random.Random(own).sample(list(targets), min(QUESTIONS_PER_ROUND, len(targets)))
    prompts = [target.prompt_ids for target in chosen]
    answers = generator.generate(
        prompts, prefix=student, max_new_tokens=settings.max_new_tokens, temperature=1.0, seed=own
    )
    scores = generator.score(prompts, answers, prefix=TEACHER, top_k=settings.top_k)
    return [
        replace(target, answer_ids=answer, top_ids=score.ids, top_logprobs=score.logprobs)
        for target, answer, score in zip(chosen, answers, scores, strict=True)
        if answer
    ]
