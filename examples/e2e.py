"""The E2E restaurants (Novikova et al., 2017) as two tasks: describe (facts -> sentence), extract (sentence -> JSON).

The data is a JSON file `{"examples": [{"input": "name: Cotto, eatType: pub", "target": "Cotto is a pub."}, ...]}`, as in
the package `bigbench`. An input is a meaning representation and may appear with several sentences. Other data in this
format works too.
"""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

from packages import download

PACKAGE = "bigbench==1.0.0"
MEMBER = "bigbench/benchmark_tasks/gem/e2e_nlg/task.json"

Facts = dict[str, str]
Message = dict[str, str]


@dataclass(frozen=True)
class Restaurant:
    """A meaning representation: its facts, and all sentences that people wrote for them."""

    facts: Facts
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """An example of a task: the chat messages, the expected answer and, for the scores, the restaurant."""

    messages: tuple[Message, ...]
    answer: str
    restaurant: Restaurant


@dataclass(frozen=True)
class Task:
    """A task to train a prefix for.

    Args:
        name: Also the name of its adapter.
        instruction: The system message. The base model gets it too, so that both see the same prompt.
        init_text: The text that initializes the prefix.
    """

    name: str
    instruction: str
    init_text: str


DESCRIBE = Task(
    name="describe",
    instruction="Describe this place in a sentence.",
    init_text="Write one short, natural sentence that states every one of the given facts about the restaurant.",
)
EXTRACT = Task(
    name="extract",
    instruction=(
        "Extract the facts as JSON: name, eatType, food, priceRange, customer rating, area, familyFriendly, near."
    ),
    init_text="Read the sentence and answer only with the facts that it states, as one JSON object.",
)
TASKS = (DESCRIBE, EXTRACT)


def get_e2e(cache: Path) -> Path:
    """Returns the path of the data in `cache`; the first call extracts it from the package."""
    path = cache / "e2e.json"
    if not path.exists():
        archive = download(PACKAGE, cache / "downloads")
        print(f"Reading {MEMBER} ...", flush=True)
        # The file is near the start of a large archive, so stream and stop there.
        with tarfile.open(archive, "r|gz") as stream:
            for member in stream:
                if member.name.endswith(MEMBER) and (file := stream.extractfile(member)):
                    path.write_bytes(file.read())
                    break
    return path


def load(path: Path) -> list[Restaurant]:
    """Returns the restaurants in the file `path`, or in `task.json` if `path` is a folder, in their order."""
    file = path / "task.json" if path.is_dir() else path
    sentences: dict[str, list[str]] = {}
    for example in json.loads(file.read_text(encoding="utf-8"))["examples"]:
        sentences.setdefault(example["input"], []).append(example["target"])
    return [Restaurant(parse_facts(meaning), tuple(texts)) for meaning, texts in sentences.items()]


def parse_facts(meaning: str) -> Facts:
    """Returns the facts of a meaning representation such as "name: Cotto, eatType: pub"."""
    facts = {}
    for fact in meaning.split(", "):
        slot, separator, value = fact.partition(": ")
        if not separator:
            raise ValueError(f"A fact must read 'slot: value', got {fact!r} in {meaning!r}.")
        facts[slot] = value
    return facts


def split(restaurants: list[Restaurant], num_held_back: int, seed: int) -> tuple[list[Restaurant], list[Restaurant]]:
    """Splits the restaurants into those to train on and those held back; no meaning representation is in both."""
    if not 0 < num_held_back < len(restaurants):
        raise ValueError(f"`num_held_back` must be in 1..{len(restaurants) - 1}, got {num_held_back}.")
    shuffled = random.Random(seed).sample(restaurants, len(restaurants))
    return shuffled[num_held_back:], shuffled[:num_held_back]


def examples(task: Task, restaurants: list[Restaurant], first_only: bool = False) -> list[Example]:
    """Returns the examples of `task`: one per sentence or, with `first_only`, one per restaurant."""
    return [
        _example(task, restaurant, sentence)
        for restaurant in restaurants
        for sentence in (restaurant.sentences[:1] if first_only else restaurant.sentences)
    ]


def _example(task: Task, restaurant: Restaurant, sentence: str) -> Example:
    if task.name == EXTRACT.name:
        question, answer = sentence, json.dumps(restaurant.facts, ensure_ascii=False)
    else:
        question, answer = ", ".join(f"{slot}: {value}" for slot, value in restaurant.facts.items()), sentence
    messages = ({"role": "system", "content": task.instruction}, {"role": "user", "content": question})
    return Example(messages, answer, restaurant)
