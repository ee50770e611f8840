"""Worked examples distilled without labels: BLEU against the whole context, one example, and as many as fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.distillation.bench import Bench, divergence_of, student_of
from benchmarks.distillation.exam import Exam, Examiner, separations
from benchmarks.distillation.many_shot import ManyShot, many_shot
from peft_prefix_ext.distillation.context import Messages, chat_context
from peft_prefix_ext.distillation.reporting.baselines import baseline_openings, worked_examples
from peft_prefix_ext.distillation.teacher import TEACHER

TASK = "many-shot"
NUM_FEW = 4
FEW = f"{NUM_FEW} shots"


def run(bench: Bench, e2e: Path, seeds: Iterable[int]) -> None:
    """Measures the seeds that have no record yet; each draws examples, inputs and tests of its own."""
    for seed in seeds:
        if bench.is_missing(task=TASK, seed=seed):
            settings = bench.settings
            task = many_shot(e2e, settings.num_shots, settings.num_inputs, settings.num_tests, seed)
            _measure(bench, task, seed)


def _measure(bench: Bench, task: ManyShot, seed: int) -> None:
    settings = bench.settings
    p = settings.many_shot_tokens
    context = chat_context(bench.tokenizer, task.opening)
    options = settings.distillation(p, settings.many_shot_answer, seed)
    distillation = bench.distillation(f"{TASK}-{seed}", context, options, task.inputs, settings.many_shot_steps)
    student = student_of(distillation)
    exam = Exam(context, task.tests, metric=task.bleu, max_new_tokens=settings.many_shot_answer)
    with bench.generator(teacher=distillation.compile(), student=student) as generator:
        openings = {
            each.name: each.messages
            for each in baseline_openings(generator, bench.tokenizer, context, p, teacher=TEACHER, seed=seed)
        }
        if "one shot" not in openings:
            # No more than one fits, or not even one, which still is one to compare with.
            openings.pop("fewer shots", None)
            openings["one shot"] = _shots(task.opening, 1)
        # Longer than the prefix; sixteen examples need not be better than a few.
        openings[FEW] = _shots(task.opening, NUM_FEW)
        examiner = Examiner(generator, bench.tokenizer, exam)
        outcomes = {name: examiner.with_opening(messages) for name, messages in openings.items()}
        outcomes["full context"] = examiner.with_prefix(TEACHER, len(context.token_ids))
        outcomes["distilled"] = examiner.with_prefix("student", p)
    bench.add(
        task=TASK,
        seed=seed,
        intervals=separations(outcomes["nothing"], outcomes["full context"]),
        rows={name: outcome.record() for name, outcome in outcomes.items()},
        divergence=divergence_of(distillation, student),
    )


def _shots(opening: Messages, number: int) -> Messages:
    head, shots = worked_examples(opening)
    return [*head, *(message for shot in shots[:number] for message in shot)]
