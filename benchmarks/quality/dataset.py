"""The E2E challenge (Novikova, Dusek and Rieser, 2017): its CSV files as prompts, answers and references."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

TRAIN_FILE = "devset.csv"
TEST_FILE = "testset_w_refs.csv"


@dataclass(frozen=True)
class Pair:
    """A meaning representation, such as "name[Cotto], eatType[pub]", and one sentence written for it; or the other way round."""

    meaning: str
    sentence: str
    label: str = "Description"

    def reversed(self) -> Pair:
        """Returns the pair of the other task: to find the facts in a sentence."""
        return Pair(self.sentence, self.meaning, "Facts")


@dataclass(frozen=True)
class Item:
    """A meaning representation and all its reference sentences."""

    meaning: str
    sentences: tuple[str, ...]


def read_pairs(path: Path) -> list[Pair]:
    """Returns the rows of one of the challenge's CSV files, in order.

    Raises:
        ValueError: If the columns are not `mr` and `ref`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != ["mr", "ref"]:
            raise ValueError(f"{path} must have the columns `mr` and `ref`, got {rows.fieldnames}.")
        return [Pair(row["mr"], row["ref"].strip()) for row in rows]


def group(pairs: list[Pair]) -> list[Item]:
    """Groups pairs by meaning representation, in order of first appearance."""
    sentences: dict[str, list[str]] = {}
    for pair in pairs:
        sentences.setdefault(pair.meaning, []).append(pair.sentence)
    return [Item(meaning, tuple(texts)) for meaning, texts in sentences.items()]


def hold_out(pairs: list[Pair], num_meanings: int) -> tuple[list[Pair], list[Pair]]:
    """Splits off all pairs of `num_meanings` random meaning representations; returns the training and the held-out pairs."""
    held = {item.meaning for item in random.Random(0).sample(group(pairs), num_meanings)}
    return [pair for pair in pairs if pair.meaning not in held], [pair for pair in pairs if pair.meaning in held]


def prompt_of(meaning: str, label: str = "Description") -> str:
    """Returns the prompt, the same for every method and the base model."""
    return f"{meaning}\n{label}:"


def answer_of(sentence: str) -> str:
    """Returns the completion to train on; an end-of-sequence token follows it."""
    return f" {sentence}"
