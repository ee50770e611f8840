"""The documents to distil: a text, questions to train on, and an exam of others."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.distillation.bench import Bench
from benchmarks.distillation.exam import Exam
from benchmarks.distillation.fact_sheets import FactSheet, fact_sheet
from benchmarks.distillation.manual_page import manual_page
from benchmarks.distillation.paraphrases import paraphrases
from peft_prefix_ext.distillation.context import Context, chat_context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.synthesis import write_questions
from peft_prefix_ext.distillation.teacher import TEACHER

SHEET, PAGE = "fact sheet", "manual page"


@dataclass(frozen=True)
class Document:
    """A text to distil.

    Args:
        text: The text.
        questions: Questions to train on, without answers.
        exam: Others. Those about a fact sheet have right answers; to those about a page, the full context's answers are right.
    """

    text: str
    questions: Sequence[Question]
    exam: Exam

    @property
    def context(self) -> Context:
        return self.exam.context


def sheet_document(bench: Bench, sheet: FactSheet, num_exam: int, max_new_tokens: int, seed: int) -> Document:
    """Returns a fact sheet, with paraphrases to train on and `num_exam` of its own questions as the exam."""
    chosen = sorted(random.Random(seed).sample(range(len(sheet.questions)), min(num_exam, len(sheet.questions))))
    exam = Exam(
        chat_context(bench.tokenizer, [{"role": "system", "content": sheet.text}]),
        [sheet.questions[index] for index in chosen],
        [sheet.choices[index] for index in chosen],
        max_new_tokens=max_new_tokens,
    )
    return Document(sheet.text, paraphrases(sheet), exam)


def page_document(
    bench: Bench, text: str, num_questions: int, num_exam: int, max_new_tokens: int, seed: int
) -> Document:
    """Returns a page with questions that the model wrote about it: `num_exam` of them are the exam."""
    context = chat_context(bench.tokenizer, [{"role": "system", "content": text}])
    questions = _written(bench, context, num_questions, seed)
    num_exam = min(num_exam, len(questions) // 2)
    exam = Exam(context, questions[:num_exam], max_new_tokens=max_new_tokens)
    return Document(text, questions[num_exam:], exam)


def document(bench: Bench, name: str, seed: int) -> Document:
    """Returns the document of a seed: another sheet, or other questions about the same page."""
    settings = bench.settings
    if name == SHEET:
        sheet = fact_sheet(settings.num_people, seed)
        return sheet_document(bench, sheet, settings.num_exam, settings.document_answer, seed)
    page = manual_page(settings.topic)
    return page_document(bench, page, settings.num_questions, settings.num_exam, settings.document_answer, seed)


def _written(bench: Bench, context: Context, number: int, seed: int) -> list[Question]:
    """Returns the questions of an earlier run, or lets the model write them, in an order that has nothing to do with their kind."""
    path = bench.work / f"questions-{context.digest[:12]}-{number}-{seed}.json"
    if not path.exists():
        with bench.generator() as generator:
            found = write_questions(generator, bench.tokenizer, context, number, seed, prefix=TEACHER)
        texts = [str(question.messages[-1]["content"]) for question in found]
        random.Random(seed).shuffle(texts)
        _replace(path, json.dumps(texts, indent=1))
    return [Question([{"role": "user", "content": text}]) for text in json.loads(path.read_text(encoding="utf-8"))]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
