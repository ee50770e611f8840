"""The scores: checked against values worked out by hand."""

import pytest
from metrics import bleu, parse_answer, slot_f1


def test_bleu_takes_the_best_of_several_references_also_if_their_numbers_differ():
    hypotheses = ["Cotto is a pub in the city centre.", "Strada is a restaurant near the river."]
    references = [
        ["A pub called Cotto.", "Cotto is a pub in the city centre."],
        ["Strada is a restaurant near the river."],
    ]
    assert bleu(hypotheses, references) == pytest.approx(100)


def test_bleu_of_nothing_in_common_is_nothing():
    assert bleu(["a b c d e"], [["v w x y z"]]) < 10


def test_slot_f1_is_micro_averaged():
    answers = ['{"name": "Cotto", "area": "riverside"}', '{"name": "Strada"}']
    expected = [{"name": "Cotto", "area": "city centre"}, {"name": "Strada", "eatType": "pub"}]
    assert slot_f1(answers, expected) == pytest.approx(2 * 2 / (3 + 4))


def test_slot_f1_ignores_case_and_outer_spaces():
    assert slot_f1(['{"Name": " cotto "}'], [{"name": "Cotto"}]) == 1


def test_slot_f1_without_answers_is_zero():
    assert slot_f1(["Cotto is a pub."], [{"name": "Cotto"}]) == 0
    assert slot_f1([], []) == 0


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        ('{"name": "Cotto"}', {"name": "Cotto"}),
        ('Sure: {"name": "Cotto"} Anything else?', {"name": "Cotto"}),
        ('{"stars": 5}', {"stars": "5"}),
        ('{"name": "Cotto"', {}),
        ("[1, 2]", {}),
        ("name: Cotto", {}),
        ("", {}),
    ],
)
def test_parse_answer_forgives_text_around_but_not_broken_json(answer, facts):
    assert parse_answer(answer) == facts
