"""Fact sheets about people who do not exist: nothing but the sheet says the answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from peft_prefix_ext.distillation.questions import Question

FIRST = (
    "Ada",
    "Boris",
    "Clara",
    "Dario",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luca",
    "Mona",
    "Nils",
)
LAST = (
    "Abbot",
    "Birk",
    "Castel",
    "Dorn",
    "Eker",
    "Falk",
    "Gruber",
    "Hale",
    "Ivers",
    "Jansen",
    "Kessel",
    "Lund",
    "Marsh",
)
FACTS = {
    "home town": ("Lisbon", "Tallinn", "Cork", "Graz", "Porto", "Turku", "Bergen", "Ghent", "Malaga", "Riga"),
    "job": ("baker", "surveyor", "nurse", "welder", "translator", "pilot", "gardener", "judge", "chemist", "tailor"),
    "pet": ("a parrot", "a tortoise", "two cats", "a hamster", "a greyhound", "an iguana", "a pony", "a ferret"),
    "instrument": (
        "the cello",
        "the oboe",
        "the banjo",
        "the harp",
        "the trumpet",
        "the piano",
        "the flute",
        "the drums",
    ),
    "room number": ("112", "127", "205", "218", "301", "324", "410", "433"),
}
TEMPLATES = {
    "home town": "{name} comes from {value}.",
    "job": "{name} works as a {value}.",
    "pet": "{name} has {value}.",
    "instrument": "{name} plays {value}.",
    "room number": "The room number of {name} is {value}.",
}
QUESTIONS = {
    "home town": "Where does {name} come from?",
    "job": "What is the job of {name}?",
    "pet": "What pet does {name} have?",
    "instrument": "Which instrument does {name} play?",
    "room number": "What is the room number of {name}?",
}
NUM_CHOICES = 4


@dataclass(frozen=True)
class FactSheet:
    """A text, and questions about each of its facts.

    Args:
        text: The text.
        questions: The questions, with the right answer as their reference.
        choices: For each question its right answer, and then wrong ones of the same kind.
    """

    text: str
    questions: list[Question]
    choices: list[list[str]]


def fact_sheet(num_people: int, seed: int) -> FactSheet:
    """Returns a sheet about so many people, five facts each: about 60 tokens for a person."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], num_people)
    lines, questions, choices = [], [], []
    for name in names:
        sentences = []
        for fact, values in FACTS.items():
            right, *wrong = draw.sample(values, NUM_CHOICES)
            sentence = TEMPLATES[fact].format
            sentences.append(sentence(name=name, value=right))
            content = QUESTIONS[fact].format(name=name)
            questions.append(Question([{"role": "user", "content": content}], sentences[-1]))
            choices.append([sentence(name=name, value=value) for value in (right, *wrong)])
        lines.append(" ".join(sentences))
    return FactSheet("\n".join(lines), questions, choices)
