"""Documents distilled into prefixes of several lengths, beside what else is as short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common.results import Record
from benchmarks.distillation.bench import Bench, divergence_of, student_of
from benchmarks.distillation.documents import PAGE, SHEET, Document, document
from benchmarks.distillation.exam import Examiner, Outcome, separations
from benchmarks.distillation.next_token import train_on_text
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.reporting.baselines import NOTHING, baseline_openings
from peft_prefix_ext.distillation.teacher import TEACHER

TASK = "documents"
DOCUMENTS = (SHEET, PAGE)
DISTILLED, NEXT_TOKEN = "distilled", "next-token training"
STUDENT = "student"


def run(bench: Bench, names: Iterable[str], lengths: Sequence[int], seeds: Iterable[int]) -> None:
    """Measures what has no record yet, all documents and lengths with one seed before the next.

    A record is of a length, and one of the length `None` has nothing and the full context.
    """
    for seed in seeds:
        for name in names:
            missing = [p for p in (None, *lengths) if bench.is_missing(task=TASK, document=name, seed=seed, length=p)]
            if missing:
                _measure(bench, name, missing, seed)


def _measure(bench: Bench, name: str, lengths: Sequence[int | None], seed: int) -> None:
    found = document(bench, name, seed)
    students = {p: _train(bench, name, found, p, seed) for p in lengths if p is not None}
    teacher = _distillation(bench, name, found, 1, seed).compile()  # the same for all lengths
    with bench.generator(teacher=teacher) as generator:
        examiner = Examiner(generator, bench.tokenizer, found.exam)
        for p in lengths:
            key = {"task": TASK, "document": name, "seed": seed, "length": p}
            if p is None:
                nothing, full = examiner.with_opening([]), examiner.with_prefix(TEACHER, len(found.context.token_ids))
                rows = {NOTHING: nothing, "full context": full}
                bench.add(**key, intervals=separations(nothing, full), rows=_records(rows))
                continue
            openings = baseline_openings(generator, bench.tokenizer, found.context, p, teacher=TEACHER, seed=seed)
            rows = {each.name: examiner.with_opening(each.messages) for each in openings if each.name != NOTHING}
            folders, divergence = students[p]
            for row, folder in folders.items():
                generator.add_prefix(STUDENT, folder)
                rows[row] = examiner.with_prefix(STUDENT, p)
            bench.add(**key, rows=_records(rows), divergence=divergence)


def _train(bench: Bench, name: str, found: Document, p: int, seed: int) -> tuple[dict[str, Path], float | None]:
    """Returns the folders of the trained prefixes of a length, and the divergence of the distilled one from its teacher."""
    distillation = _distillation(bench, name, found, p, seed)
    student = student_of(distillation)
    folder = distillation.folder.path / f"next-token-{p}-{bench.settings.document_steps}"
    on_text = train_on_text(distillation, found.text, folder)
    return {NEXT_TOKEN: on_text, DISTILLED: student}, divergence_of(distillation, student)


def _distillation(bench: Bench, name: str, found: Document, p: int, seed: int) -> Distillation:
    settings = bench.settings
    options = settings.distillation(p, settings.document_answer, seed)
    folder = f"{name.replace(' ', '-')}-{seed}"
    return bench.distillation(folder, found.context, options, found.questions, settings.document_steps)


def _records(outcomes: dict[str, Outcome]) -> dict[str, Record]:
    return {name: outcome.record() for name, outcome in outcomes.items()}
