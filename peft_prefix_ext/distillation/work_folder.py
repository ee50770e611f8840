"""The work folder of a distillation: what each stage made, so that a run that was stopped goes on where it was.

inputs.json             what the questions and the teacher's answers depend on
context/                the compiled context, an adapter like any other
questions.jsonl         the questions
targets.jsonl           the teacher's answers, with their most probable tokens
student-HASH-SEED/      a student, with the checkpoints of its training; HASH is of the settings that it depends on
seconds.json            how long each stage took
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_prefix_ext.checkpoint.context import text_hash
from peft_prefix_ext.distillation.questions import Question, read_questions
from peft_prefix_ext.training.work_folder import WorkFolder, read_json, write_json, write_text

_QUESTIONS, _SECONDS, _RESULT = "questions.jsonl", "seconds.json", "result.json"


class DistillationFolder(WorkFolder):
    """Reads and writes the files of the stages; each appears whole or not at all.

    Args:
        path: The folder; it is created if needed.
        inputs: What the questions and answers depend on, as JSON.

    Raises:
        ValueError: If the folder has been made from other inputs.
    """

    def __init__(self, path: str | Path, inputs: dict[str, Any]) -> None:
        super().__init__(path, inputs, "questions and answers")

    @property
    def context(self) -> Path:
        return self.path / "context"

    @property
    def targets(self) -> Path:
        return self.path / "targets.jsonl"

    def student(self, settings: dict[str, Any], seed: int) -> Path:
        """Returns the folder of a student with these settings and this seed."""
        digest = text_hash(json.dumps(settings, sort_keys=True))[:8]
        return self.path / f"student-{digest}-{seed}"

    def questions(self) -> list[Question] | None:
        """Returns the questions of an earlier run, `None` if there are none."""
        path = self.path / _QUESTIONS
        return read_questions(path) if path.exists() else None

    def write_questions(self, questions: Sequence[Question]) -> None:
        rows = (
            json.dumps({"messages": [*each.messages, *_assistant(each.reference)]}, ensure_ascii=False)
            for each in questions
        )
        write_text(self.path / _QUESTIONS, "\n".join(rows) + "\n")

    def is_answered(self) -> bool:
        """Returns whether every question has its answer. Another process may write them meanwhile."""
        questions = self.questions()
        return (
            questions is not None and self.targets.exists() and self.targets.read_bytes().count(b"\n") == len(questions)
        )

    def result(self, student: Path) -> dict[str, Any] | None:
        """Returns what was recorded of a student whose training ended, else `None`."""
        found: dict[str, Any] | None = read_json(student / _RESULT)
        return found

    def write_result(self, student: Path, result: dict[str, Any]) -> None:
        write_json(student / _RESULT, result)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time that the context takes to that of a stage, also if it ends with an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = read_json(self.path / _SECONDS) or {}
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
            write_json(self.path / _SECONDS, seconds)

    def seconds(self) -> dict[str, float]:
        """Returns how long each stage took, in all runs together."""
        return read_json(self.path / _SECONDS) or {}


def _assistant(reference: str | None) -> list[dict[str, str]]:
    return [] if reference is None else [{"role": "assistant", "content": reference}]
