"""Meaning representations: read, split without leaks, and made into the examples of both tasks."""

import json

import pytest
from e2e import DESCRIBE, EXTRACT, examples, load, parse_facts, split

ROWS = [
    {"input": "name: Cotto, eatType: pub", "target": "Cotto is a pub."},
    {"input": "name: Cotto, eatType: pub", "target": "There is a pub, Cotto."},
    {"input": "name: Strada, near: Café Sicilia", "target": "Strada is near Café Sicilia."},
    {"input": "name: Giraffe, customer rating: 5 out of 5", "target": "Giraffe has 5 of 5 stars."},
]


@pytest.fixture
def restaurants(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"examples": ROWS}), encoding="utf-8")
    return load(tmp_path / "task.json")


def test_load_groups_the_sentences_of_a_meaning(restaurants, tmp_path):
    assert [len(restaurant.sentences) for restaurant in restaurants] == [2, 1, 1]
    assert load(tmp_path) == restaurants


def test_parse_facts_keeps_order_and_spaces():
    facts = parse_facts("name: Blue Spice, customer rating: 5 out of 5")
    assert list(facts.items()) == [("name", "Blue Spice"), ("customer rating", "5 out of 5")]


def test_parse_facts_names_what_it_cannot_read():
    with pytest.raises(ValueError, match="got 'pub'"):
        parse_facts("name: Cotto, pub")


def test_split_holds_back_whole_meanings_and_depends_on_the_seed_only(restaurants):
    training_set, held_back = split(restaurants, 1, seed=3)
    assert len(held_back) == 1
    assert sorted(map(str, training_set + held_back)) == sorted(map(str, restaurants))
    assert split(restaurants, 1, seed=3) == (training_set, held_back)


@pytest.mark.parametrize("count", [0, 3])
def test_split_needs_restaurants_on_both_sides(restaurants, count):
    with pytest.raises(ValueError, match="num_held_back"):
        split(restaurants, count, seed=0)


def test_describe_goes_from_facts_to_sentence(restaurants):
    example = examples(DESCRIBE, restaurants)[1]
    assert example.messages[0] == {"role": "system", "content": DESCRIBE.instruction}
    assert example.messages[1]["content"] == "name: Cotto, eatType: pub"
    assert example.answer == "There is a pub, Cotto."


def test_extract_goes_from_sentence_to_json(restaurants):
    example = examples(EXTRACT, restaurants, first_only=True)[1]
    assert example.messages[1]["content"] == "Strada is near Café Sicilia."
    assert example.answer == '{"name": "Strada", "near": "Café Sicilia"}'
