"""Targets: the teacher's answers with their most probable tokens, made once and stored as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_prefix_ext.distillation.context import Messages
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.generation.generator import TokenIds, TopLogprobs

DIGITS = 5  # of a log-probability on disk


@dataclass(frozen=True)
class Target:
    """An answer of the teacher.

    Args:
        number: The number of its question.
        messages: The question, as in `Question`.
        reference: Its right answer, if one is known.
        prompt_ids: The tokens that stand behind the context, up to the start of the answer.
        answer_ids: The tokens of the answer.
        top_ids: The teacher's most probable tokens at each position of the answer, `[num_tokens, k]`; empty for a question
            that is not used, since the base model answers it the same without the context.
        top_logprobs: Their log-probabilities, `[num_tokens, k]`.
    """

    number: int
    messages: Messages
    reference: str | None
    prompt_ids: TokenIds
    answer_ids: TokenIds
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @classmethod
    def of(cls, number: int, question: Question, prompt: TokenIds, answer: TokenIds, top: TopLogprobs) -> Target:
        """Returns the target of a question from what a `Generator` says."""
        return cls(number, question.messages, question.reference, prompt, answer, top.ids, top.logprobs)

    @property
    def question(self) -> Question:
        return Question(self.messages, self.reference)

    @property
    def is_used(self) -> bool:
        return bool(self.top_ids)


def append_targets(path: Path, targets: Iterable[Target]) -> None:
    """Adds targets to a file, each in a line of its own."""
    with path.open("a", encoding="utf-8") as file:
        for target in targets:
            row = {
                **vars(target),
                "top_logprobs": [[round(each, DIGITS) for each in row] for row in target.top_logprobs],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_targets(path: Path) -> list[Target]:
    """Returns the targets in a file, and cuts off the unfinished last line of a run that was killed.

    Raises:
        ValueError: If another line is malformed.
    """
    whole, targets = 0, []
    for end, line, is_last in _lines(path):
        try:
            targets.append(Target(**json.loads(line)))
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            if is_last:
                break
            raise ValueError(f"{path}, line {len(targets) + 1} is no target; remove that line.") from error
        whole = end
    if path.exists() and path.stat().st_size > whole:
        with path.open("rb+") as file:
            file.truncate(whole)
    return targets


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yields each line with where it ends, in bytes, and whether it is the last."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    end = 0
    for number, line in enumerate(lines, 1):
        end += len(line)
        yield end, line, number == len(lines) and not line.endswith(b"\n")
