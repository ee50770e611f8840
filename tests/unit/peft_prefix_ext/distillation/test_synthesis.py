"""Questions that the base model writes, about a text or after worked examples."""

from __future__ import annotations

from itertools import cycle

import pytest

from helpers.chats import CHATML, LLAMA, tokenizer_with
from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.distillation.synthesis import CHUNK_TOKENS, KINDS, chunks, write_questions

TEXT = "Aromi serves Italian food near the river, and costs little. " * 40
EXAMPLES = [
    {"role": "system", "content": "Describe."},
    {"role": "user", "content": "name: Aromi"},
    {"role": "assistant", "content": "Aromi is a place."},
]


class Scripted:
    """A `Generator` that says given texts in turn, and keeps its prompts."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.prompts, self.prefixes = tokenizer, cycle(texts), [], []

    def generate(self, prompts, *, prefix=None, **options):
        self.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        self.prefixes.append(prefix)
        return [self.tokenizer(next(self.texts), add_special_tokens=False).input_ids for _ in prompts]


def write(messages, texts, number, template=CHATML):
    tokenizer = tokenizer_with(template)
    generator = Scripted(tokenizer, texts)
    return write_questions(generator, tokenizer, chat_context(tokenizer, messages), number, 0, "teacher"), generator


def asked(*texts):
    return [Question([{"role": "user", "content": text}]) for text in texts]


def test_requests_about_chunks_of_a_text():
    system = [{"role": "system", "content": TEXT}]
    texts = [
        '\n 1. "Where is Aromi?"\nIt is near.',
        "- List the prices.",
        "Where is Aromi?",
        "What",
        "",
        "Is it dear? ",
    ]
    found, generator = write(system, texts, 3)
    assert found == asked("Where is Aromi?", "List the prices.", "Is it dear?")
    assert set(generator.prefixes) == {None}
    parts = chunks(generator.tokenizer, TEXT)
    assert len(parts) > 1
    assert all(len(generator.tokenizer(part).input_ids) <= CHUNK_TOKENS for part in parts)
    assert all(any(part in prompt for part in parts) for prompt in generator.prompts)
    assert {kind for kind in KINDS.values() for prompt in generator.prompts if kind in prompt} >= set(
        list(KINDS.values())[:3]
    )


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA, "<|eot|>")])
def test_the_next_turns_of_worked_examples(template, end):
    texts = [f"name: Cotto{end}\nrest", "half a tur", f"name: Aromi{end}", f"name: Bibi {end}"]
    found, generator = write(EXAMPLES, texts, 3, template)
    # Their own inputs come first; what the model repeats counts once.
    assert found == asked("name: Aromi", "name: Cotto", "name: Bibi")
    assert set(generator.prefixes) == {"teacher"}
    assert all(prompt.rstrip().endswith(("user", "user<|end|>")) for prompt in generator.prompts)


def test_a_model_that_writes_nothing_of_use():
    with pytest.raises(ValueError, match="wrote no question that can be used; give questions of your own"):
        write([{"role": "system", "content": TEXT}], ["", "No"], 4)


def test_fewer_questions_than_wanted_are_enough():
    found, generator = write([{"role": "system", "content": TEXT}], ["Where is Aromi?"], 3)
    assert found == asked("Where is Aromi?")
    assert len(generator.prompts) == 3 + 2 + 2 + 2
