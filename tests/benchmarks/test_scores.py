"""Scores rise with the overlap of an answer and its references."""

import pytest

from benchmarks.quality.scores import bleu, nist, rouge_l, score

REFERENCES = [
    ["Cotto is a cheap pub near the river.", "A cheap pub by the river is Cotto."],
    ["The Punter serves good Italian food in the city centre."],
]
RIGHT = [REFERENCES[0][1], REFERENCES[1][0]]
CLOSE = ["A cheap pub by the river is Aromi.", "The Punter serves good food in the city."]
WRONG = ["I do not know.", "Toyota builds cars."]


def test_a_reference_itself_has_the_highest_scores():
    scores = score(RIGHT, REFERENCES)
    assert scores["bleu"] == pytest.approx(100)
    assert scores["rouge_l"] == pytest.approx(100)
    assert scores["nist"] == pytest.approx(nist([texts[-1] for texts in REFERENCES], REFERENCES))


@pytest.mark.parametrize("one", [bleu, nist, rouge_l])
def test_scores_order_answers(one):
    assert one(RIGHT, REFERENCES) > one(CLOSE, REFERENCES) > one(WRONG, REFERENCES) >= 0


@pytest.mark.parametrize("one", [bleu, nist, rouge_l])
def test_empty_answers_score_nothing(one):
    assert one(["", ""], REFERENCES) == 0
