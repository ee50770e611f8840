"""Questions about a fact sheet to distil it with, in other words than the questions of `fact_sheets`, which test."""

from __future__ import annotations

from benchmarks.distillation.fact_sheets import FactSheet, names
from peft_prefix_ext.distillation.questions import Question

# To the second kind, small models answer with whole sentences of the sheet, to the first they rarely do.
ABOUT_FACTS = (
    ("Which town is {name} from?", "Complete the sentence: {name} comes from"),
    ("How does {name} earn a living?", "Complete the sentence: {name} works as a"),
    ("Which animal lives with {name}?", "Complete the sentence: {name} has"),
    ("What does {name} make music with?", "Complete the sentence: {name} plays"),
    ("In which room is {name}?", "Complete the sentence: The room number of {name} is"),
)


def paraphrases(sheet: FactSheet) -> list[Question]:
    """Returns two questions about each fact of a sheet, without answers."""
    contents = [
        template.format(name=name) for name in names(sheet) for templates in ABOUT_FACTS for template in templates
    ]
    return [Question([{"role": "user", "content": content}]) for content in contents]
