"""The report of the distillation benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.docs_pages import DOCS, markers
from benchmarks.common.results import RESULTS
from benchmarks.distillation.__main__ import main
from benchmarks.distillation.documents import PAGE, SHEET
from benchmarks.distillation.report import NO_RESULTS, write_report
from benchmarks.distillation.settings import TASKS, Settings
from benchmarks.distillation.tasks import speed, step, together

MACHINE = {"accelerator": None, "cores": 2, "cpu": "A", "versions": {"torch": "2"}, "revision": "abc"}


def document_record(name: str, seed: int, length: int | None, **rows: float) -> dict:
    """Returns a record in which all measures of a row have one value; the names of rows have underscores for spaces."""
    measures = ("choice", "logprob", "score") if name == SHEET else ("logprob", "score")
    return {
        **{"task": "documents", "document": name, "seed": seed, "length": length, "machine": MACHINE},
        "rows": {
            row.replace("_", " "): {"tokens": length or 1000, **dict.fromkeys(measures, value)}
            for row, value in rows.items()
        },
        # The score never separates.
        **({} if length else {"intervals": {name: [0.1 - 0.2 * (name == "score"), 0.5] for name in measures}}),
    }


def made_up() -> dict:
    records = []
    for seed in (0, 1):
        for name in (SHEET, PAGE):
            records.append(document_record(name, seed, None, nothing=0.2, full_context=0.7))
            for length in (16, 64):
                records.append(
                    document_record(name, seed, length, summary=0.3, distilled=0.45 + 0.1 * seed + length / 1000)
                )
        rows = {"nothing": 10.0, "one shot": 15.0, "full context": 20.0, "distilled": 20.0 + 5 * seed}
        records.append(
            {
                **{"task": "many-shot", "seed": seed, "machine": MACHINE, "intervals": {"score": [1.0, 19.0]}},
                "rows": {name: {"tokens": 64, "logprob": -1.0, "score": value} for name, value in rows.items()},
            }
        )
        for number, value in ((0, 0.9), (1, 0.8), (2, 0.4)):
            rows = {"full context": value} if not number else {together.APART: value, together.BESIDE: 0.7}
            records.append(
                {
                    **{"task": "together", "seed": seed, "number": number, "machine": MACHINE},
                    "rows": {name: {"tokens": 8, "choice": each, "logprob": -each} for name, each in rows.items()},
                }
            )
    measured = {
        name: [{"tokens_per_second": 100.0 * place, "ttft_p50": 1.0 / place, "ttft_alone": 0.5 / place}] * 3
        for place, name in enumerate((speed.UNCACHED, speed.CACHED, speed.COMPILED, speed.DISTILLED), start=1)
    }
    records.append({"task": "speed", "measurements": measured, "machine": MACHINE})
    steps = {step.PLAIN: [{"seconds": 2.0}] * 3, step.DISTILLATION: [{"seconds": 2.2}] * 3}
    records.append({"task": "step", "measurements": steps, "machine": MACHINE})
    return {"settings": Settings("folder/tiny").record(), "records": records}


def test_report(tmp_path: Path) -> None:
    results, page = tmp_path / "distillation.json", tmp_path / "distillation.md"
    results.write_text(json.dumps(made_up()), encoding="utf-8")
    page.write_text("\n".join(markers("distillation")), encoding="utf-8")
    text = write_report(results, page)
    assert text in page.read_text(encoding="utf-8")
    assert "![Recovered share by the length of the prefix](distillation.png)" in text
    assert results.with_suffix(".png").stat().st_size > 10_000
    # The mean of the shares of both seeds, and these.
    assert "| distilled | 64 | 20.0 | 25.0 | 22.5 (20.0 to 25.0) | 1.25 (1.00 to 1.50) |" in text
    assert "| distilled | 0.63 (0.53 to 0.73) | 0.73 (0.63 to 0.83) |" in text
    assert "distilled is ahead of all others by more than the seeds differ at 16, 64 tokens" in text
    # No shares where nothing and the full context do not separate.
    verdict = text[text.index("word F1") :]
    assert "No verdict" in verdict
    assert "| summary | 0.30 | 0.30 |" in verdict
    assert "| distilled apart | 2 | 0.40 | -0.40 |" in text
    assert "| full context, as text that no cache holds | 4.000 (4.000 to 4.000) | 0.250 (0.250 to 0.250) |" in text
    assert "| time of a step | 1.100 (1.100 to 1.100) |" in text


@pytest.mark.parametrize("task", TASKS)
def test_report_of_a_part(tmp_path: Path, task: str) -> None:
    results = tmp_path / "distillation.json"
    content = made_up()
    content["records"] = [record for record in content["records"] if record["task"] == task]
    results.write_text(json.dumps(content), encoding="utf-8")
    text = write_report(results)
    assert text.count("\n### ") == 1
    assert results.with_suffix(".png").exists() == (task == "documents")


def test_the_page_shows_the_results(tmp_path: Path) -> None:
    """Or says that there are none."""
    results = tmp_path / "benchmarks" / "results" / "distillation.json"
    page = tmp_path / "docs" / "benchmarks" / "distillation.md"
    for source, target in ((RESULTS / results.name, results), (DOCS / page.name, page)):
        target.parent.mkdir(parents=True)
        if source.exists() or source.suffix == ".md":
            target.write_bytes(source.read_bytes())
    text = write_report(results, page)
    assert (text == NO_RESULTS) != results.exists()
    assert page.read_text(encoding="utf-8") == (DOCS / page.name).read_text(encoding="utf-8")


def test_command_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--results", str(tmp_path / "none.json")]) == 0
    assert capsys.readouterr().out == f"{NO_RESULTS}\n"
