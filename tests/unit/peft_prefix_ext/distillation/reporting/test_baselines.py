"""What stands in a context's place at a prefix's length: within the budget, and parts of the context itself."""

from __future__ import annotations

import json

import pytest

from helpers.distillation import SYSTEM, TEXT, chat_generator, chat_model, chatml_tokenizer, shot
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import chat_context, text_context
from peft_prefix_ext.distillation.reporting.baselines import baseline_openings, opening_length, worked_examples
from peft_prefix_ext.generation.generator import TopLogprobs

SHOTS = [shot(f"name: {name}", f"{name} serves food.") for name in ("Aromi", "The Mill", "The River", "Scents")]


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def openings(tokenizer, tmp_path_factory):
    """Makes the openings for the messages of a context, by name."""
    generator = chat_generator(tokenizer)
    contexts = {}

    def context_of(messages):
        key = json.dumps(messages)
        if key not in contexts:
            contexts[key] = chat_context(tokenizer, messages), tmp_path_factory.mktemp("teacher")
            compile_context(chat_model(tokenizer), *contexts[key])
        return contexts[key]

    def make(messages, num_tokens, seed=0):
        context, folder = context_of(messages)
        generator.add_prefix("teacher", folder)
        found = baseline_openings(generator, tokenizer, context, num_tokens, seed=seed)
        assert found[0].name == "nothing"
        by_name = {each.name: each.messages for each in found}
        assert len(by_name) == len(found)
        lengths = {name: opening_length(tokenizer, context, opening) for name, opening in by_name.items()}
        assert all(length - lengths["nothing"] <= num_tokens for length in lengths.values())
        return by_name, {name: length - lengths["nothing"] for name, length in lengths.items()}

    return make


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize("num_tokens", [8, 40])
def test_parts_of_a_text_use_what_there_is_room_for(openings, num_tokens):
    found, lengths = openings([system(TEXT)], num_tokens)
    assert list(found) == ["nothing", "truncation", "sampled chunks", "summary"]
    assert found["nothing"] == []
    (truncation,) = found["truncation"]
    assert truncation["role"] == "system"
    assert TEXT.startswith(truncation["content"])
    # One character more is at most a few tokens more.
    assert lengths["truncation"] >= num_tokens - 4
    (chunks,) = found["sampled chunks"]
    places = [TEXT.find(chunk) for chunk in chunks["content"].split("\n")]
    assert places[0] >= 0
    assert lengths["sampled chunks"] > num_tokens - 12
    assert found["summary"][0]["content"]


def test_chunks_are_of_the_whole_text_in_order_and_follow_the_seed(openings):
    text = " ".join(f"{number:04}" for number in range(60))
    first, again, other = (openings([system(text)], 64, seed)[0]["sampled chunks"] for seed in (1, 1, 2))
    assert first == again != other
    parts = first[0]["content"].split("\n")
    places = [text.index(part) for part in parts]
    assert len(parts) > 2
    assert places == sorted(places)
    assert all(start + len(part) <= after for start, part, after in zip(places, parts, places[1:], strict=False))
    assert places[-1] > len(text) / 2


def test_what_does_not_fit_is_left_out(openings):
    """Of a text behind an instruction; a message of its own takes more tokens than there are."""
    instruction = {"role": "user", "content": "Obey."}
    found, _ = openings([instruction, system(TEXT)], 3)
    assert found == {"nothing": [instruction]}
    found, _ = openings([instruction, system(TEXT)], 40)
    assert list(found) == ["nothing", "truncation", "sampled chunks", "summary"]
    assert all(opening[0] == instruction for opening in found.values())


def test_a_short_text_is_not_repeated(openings):
    found, _ = openings([system("Aromi.")], 40)
    assert found["truncation"] == [system("Aromi.")]


def test_fewer_shots(openings):
    messages = [SYSTEM, *(message for each in SHOTS for message in each)]
    expected = {0: ["nothing"], 1: ["fewer shots"], 2: ["fewer shots", "one shot"], 3: ["fewer shots", "one shot"]}
    seen = set()
    for num_tokens in range(10, 150, 15):
        found, lengths = openings(messages, num_tokens)
        assert found["nothing"] == [SYSTEM]
        count = (len(found.get("fewer shots", [SYSTEM])) - 1) // 2
        assert set(found) == {"nothing", *expected[count]}
        if count:
            assert found["fewer shots"] == messages[: 1 + 2 * count]
        if count > 1:
            assert found["one shot"] == messages[:3]
            assert lengths["one shot"] < lengths["fewer shots"]
        seen.add(count)
    assert seen == {0, 1, 2, 3}  # all four are the context itself


def test_worked_examples():
    assert worked_examples([SYSTEM]) == ([SYSTEM], [])
    assert worked_examples([*SHOTS[0], *SHOTS[1]]) == ([], SHOTS[:2])
    assert worked_examples([SYSTEM, *SHOTS[0], *SHOTS[1]]) == ([SYSTEM], SHOTS[:2])


def test_an_empty_summary_is_left_out(tokenizer):
    class Silent:
        def generate(self, prompts, **options):
            return [[tokenizer.eos_token_id] for _ in prompts]

        def score(self, prompts, answers, **options):
            return [TopLogprobs([], [], []) for _ in prompts]

        def add_prefix(self, name, folder):
            pass

    found = baseline_openings(Silent(), tokenizer, chat_context(tokenizer, [system(TEXT)]), 40)
    assert [each.name for each in found] == ["nothing", "truncation", "sampled chunks"]


def test_a_text_that_is_no_chat_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must be the opening of a chat"):
        baseline_openings(chat_generator(tokenizer), tokenizer, text_context(tokenizer, [TEXT]), 8)
