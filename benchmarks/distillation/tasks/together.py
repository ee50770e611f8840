"""Several prefixes behind one another: distilled apart, and distilled to stand beside the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.common.results import Record
from benchmarks.distillation.bench import Bench, student_of
from benchmarks.distillation.documents import Document, sheet_document
from benchmarks.distillation.exam import Examiner, Outcome
from benchmarks.distillation.fact_sheets import fact_sheet, parts
from peft_prefix_ext.conversion.compose import compose
from peft_prefix_ext.distillation.distill import Distillation
from peft_prefix_ext.distillation.reporting.baselines import NOTHING
from peft_prefix_ext.distillation.teacher import TEACHER

TASK = "together"
APART, BESIDE = "distilled apart", "distilled with the others"


def run(bench: Bench, seeds: Iterable[int]) -> None:
    """Measures the seeds and sizes that have no record yet.

    A record is of a number of prefixes, and one of the number 0 has nothing and the full context. Each row is the mean over
    all sheets, whose questions are asked with the prefix of the sheet among the others.
    """
    for seed in seeds:
        sizes = [
            size for size in sizes_of(bench.settings.num_sheets) if bench.is_missing(task=TASK, seed=seed, number=size)
        ]
        if sizes:
            _measure(bench, sizes, seed)


def sizes_of(num_sheets: int) -> list[int]:
    """Returns the numbers of prefixes to put together, 0 for none of them."""
    return [0, *(size for size in (1, 2, 4) if size <= num_sheets)]


def _measure(bench: Bench, sizes: Sequence[int], seed: int) -> None:
    settings = bench.settings
    number = settings.num_sheets
    sheets = parts(fact_sheet(number * settings.people_per_sheet, seed), number)
    documents = [sheet_document(bench, sheet, settings.num_exam // 2, 0, seed) for sheet in sheets]
    alone = [_distillation(bench, found, index, seed) for index, found in enumerate(documents)]
    apart = [student_of(each) for each in alone]
    beside = [
        student_of(replace(each, companions=[*apart[:index], *apart[index + 1 :]])) for index, each in enumerate(alone)
    ]
    for size in sizes:
        if size:
            rows = {
                name: _composed(bench, documents, folders, size) for name, folders in ((APART, apart), (BESIDE, beside))
            }
        else:
            rows = _references(bench, documents, [each.compile() for each in alone])
        bench.add(task=TASK, seed=seed, number=size, rows=rows)


def _distillation(bench: Bench, found: Document, index: int, seed: int) -> Distillation:
    settings = bench.settings
    options = settings.distillation(settings.together_tokens, settings.document_answer, seed)
    return bench.distillation(
        f"{TASK}-{seed}-{index}", found.context, options, found.questions, settings.document_steps
    )


def _composed(bench: Bench, documents: Sequence[Document], folders: Sequence[Path], size: int) -> Record:
    """Returns the mean over all sheets, with prefixes in groups of `size`."""
    outcomes = []
    composed = bench.work / "composed"
    p = bench.settings.together_tokens
    for start in range(0, len(folders) - size + 1, size):
        compose([*folders[start : start + size]], composed)
        with bench.generator(composed=composed) as generator:
            for found in documents[start : start + size]:
                outcomes.append(Examiner(generator, bench.tokenizer, found.exam).with_prefix("composed", size * p))
    return _mean(outcomes)


def _references(bench: Bench, documents: Sequence[Document], teachers: Sequence[Path]) -> dict[str, Record]:
    nothing, full = [], []
    for found, teacher in zip(documents, teachers, strict=True):
        with bench.generator(teacher=teacher) as generator:
            examiner = Examiner(generator, bench.tokenizer, found.exam)
            nothing.append(examiner.with_opening([]))
            full.append(examiner.with_prefix(TEACHER, len(found.context.token_ids)))
    return {NOTHING: _mean(nothing), "full context": _mean(full)}


def _mean(outcomes: Sequence[Outcome]) -> Record:
    records = [outcome.record() for outcome in outcomes]
    return {name: round(fmean(record[name] for record in records), 5) for name in records[0]}
