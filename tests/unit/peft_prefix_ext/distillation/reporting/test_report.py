"""Reports as JSON and as a page, and their section of a model card."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from huggingface_hub import ModelCard

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model
from peft_prefix_ext.distillation.reporting.costs import Cost
from peft_prefix_ext.distillation.reporting.drift import Drift
from peft_prefix_ext.distillation.reporting.recovered_share import Separation
from peft_prefix_ext.distillation.reporting.report import Report, Row, number, spread
from peft_prefix_ext.distillation.reporting.report_page import add_to_card, to_markdown, write_report

CLEAR, UNCLEAR = Separation(0.2, 0.6, (0.1, 0.7)), Separation(-3.0, -2.5, (-0.1, 0.4))


def report(scores=(0.5, 0.7), **changes):
    made = Report(
        rows=[
            Row("nothing", 0, [0.2], [-3.0], ["No."]),
            Row("full context", 954, [0.6], [-2.5], ["Aromi | Mill"]),
            Row("truncation", 16, [0.3], [-2.9], ["?"]),
            Row("summary", 15, [0.4], [-2.8], ["?"]),
            Row("prefix", 16, list(scores), [-2.6] * len(scores), ["Aromi"], is_prefix=True),
        ],
        metric="word F1",
        score=CLEAR,
        logprob=UNCLEAR,
        questions=["What?"] * 9,
        references=["Aromi"] * 9,
        num_own_references=4,
        drift={"full context": [Drift(0.4, 0.8)], "prefix": [Drift(0.2, 0.9), Drift(0.1, 0.95)]},
        costs=[Cost("full context, as text", 954, 9540, 0.5, 20.0), Cost("prefix", 16, 160, 0.1, 40.0)],
        seconds_spent=100.0,
        requests_until_paid=250.0,
        sources={"a|b.txt": "ab" * 32},
        settings={"seed": 0},
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("logprob", [UNCLEAR, Separation(0.1, 0.3, None)])
def test_json_holds_all_of_it(logprob):
    made = report(logprob=logprob)
    assert Report.from_json(made.to_json()) == made


def test_the_page():
    page = to_markdown(report())
    lines = page.splitlines()
    assert lines[2] == "|  | tokens | word F1 | recovered | log-probability | recovered |"
    assert "| nothing | 0 | 0.200 |  | -3.000 |  |" in lines
    assert "| full context | 954 | 0.600 | 1.000 | -2.500 |  |" in lines
    assert (
        "| **prefix** | 16 | 0.600 (0.500 to 0.700) | 1.000 (0.750 to 1.250) | -2.600 (-2.600 to -2.600) |  |" in lines
    )
    assert lines[0] == "# 16 tokens in place of 954"
    assert "9 held-out questions; to 4 of them the full context's own answer counts as right. The other" in page
    assert "9 held-out questions. The other openings may be as many" in to_markdown(report(num_own_references=0))
    assert "| prefix | 0.150 (0.100 to 0.200) | 0.925 (0.900 to 0.950) |" in lines
    assert "| prefix | 16 | 160 | 100.0 | 40.0 |" in lines
    assert "which 250 requests win back" in page
    assert f"| a\\|b.txt | `{'ab' * 32}` |" in lines
    assert "which no request wins back" in to_markdown(report(requests_until_paid=None))
    assert "seconds to make" not in to_markdown(report(seconds_spent=None))


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ((0.5, 0.7), "and is ahead of the best of the other openings, summary (0.600 (0.500 to 0.700) against 0.400)."),
        ((0.3,), "By word F1, prefix recovers 0.250 of what the full context adds, and is behind the best"),
        ((0.3, 0.5), "and does not differ by more than its seeds from the best of the other openings, summary"),
        ((0.4,), "and equals the best"),
    ],
)
def test_the_verdict(scores, sentence):
    made = report(scores)
    by_score, by_logprob, caveat = made.verdict()
    assert sentence in by_score
    assert caveat.startswith("For 4 of 9 questions no right answer is known")
    assert len(report(scores, num_own_references=0).verdict()) == 2
    assert "do not separate on 9 questions" in by_logprob
    assert f"- {by_score}" in to_markdown(made)


def test_no_verdict():
    for measure, sentence in {
        Separation(0.5, 0.5, (-0.1, 0.1)): "do not separate on 9 questions (95 % interval of the difference -0.100 to",
        Separation(0.5, 0.1, (-0.6, -0.2)): "the full context is worse than nothing",
        Separation(0.1, 0.9, None): "9 questions are too few",
    }.items():
        made = report(score=measure, logprob=measure, num_own_references=0)
        assert all(sentence in found for found in made.verdict())
        assert len(made.verdict()) == 2
        assert made.recovered_shares(made.rows[-1]) is None
        assert "recovers" not in to_markdown(made)


def test_without_baselines():
    made = report()
    made = dataclasses.replace(made, rows=[*made.rows[:2], made.rows[-1]])
    assert made.verdict()[0] == "By word F1, prefix recovers 1.000 (0.750 to 1.250) of what the full context adds."


def test_numbers():
    assert [number(value) for value in (0.12345, -9.5, 22.44, 12345.6)] == ["0.123", "-9.500", "22.4", "12,345.6"]
    assert spread([1.0]) == "1.000"
    assert spread([1.0, 2.0, 4.5]) == "2.500 (1.000 to 4.500)"


def test_files(tmp_path, monkeypatch):
    page = write_report(report(), tmp_path / "new")
    assert Report.from_json((tmp_path / "new" / "report.json").read_text(encoding="utf-8")) == report()
    assert page.read_text(encoding="utf-8").startswith(to_markdown(report()))
    assert "![Scores](report.png)" in page.read_text()
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = write_report(report(), tmp_path / "plain")
    assert "There is no plot, since matplotlib is not installed." in page.read_text()
    assert not (tmp_path / "plain" / "report.png").exists()


def test_the_model_card_has_one_report(tmp_path):
    model = with_prefix(tiny_model("llama"))
    model.save_pretrained(str(tmp_path))
    before = ModelCard.load(tmp_path / "README.md")
    add_to_card(tmp_path, report())
    add_to_card(tmp_path, report((0.3,)))
    model.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## What it keeps of its context") == 1
    assert "| **prefix** | 16 | 0.300 | 0.250 |" in card.text
    assert "is ahead of" not in card.text
    assert card.text.count("## Prefix `default`") == 1
    # Right behind the section on the prefix; nothing else changes.
    own, end, after = card.text.partition("<!-- /peft-prefix-ext -->")
    assert after.startswith("\n\n<!-- peft-prefix-ext report -->")
    rest = after.partition("<!-- /peft-prefix-ext report -->")[2]
    assert own + end + rest == before.text
    assert card.data.to_dict() == before.data.to_dict()


def test_a_folder_without_a_card_gets_one(tmp_path):
    add_to_card(tmp_path, report())
    assert "## What it keeps of its context" in (tmp_path / "README.md").read_text(encoding="utf-8")
