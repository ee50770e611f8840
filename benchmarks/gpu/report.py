"""The results as tables and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.docs_pages import image, write_generated_part
from benchmarks.common.machine import describe_all
from benchmarks.common.results import Record
from benchmarks.common.tables import markdown_table
from benchmarks.distillation.report import speed_table
from benchmarks.gpu.goals import goals
from benchmarks.gpu.plan import DISTILLED, PARITY, SERVING, TRAINING
from benchmarks.gpu.run_steps import DONE
from benchmarks.serving import report as serving
from benchmarks.training import report as training

NO_RESULTS = "Not measured yet."
DRY = "A dry run on a CPU: these figures say nothing of a GPU."


def write_report(results: Path, page: Path | None = None) -> str:
    """Saves the plots beside the results and writes the report into a page, if one is given.

    Returns:
        The report in Markdown; without results it says so.
    """
    text = NO_RESULTS
    if results.exists() and (content := json.loads(results.read_text(encoding="utf-8")))["records"]:
        text = "\n\n".join(filter(None, sections(content, results, page)))
    if page is not None:
        write_generated_part(page, "gpu", text)
    return text


def sections(content: Record, results: Path, page: Path | None) -> Iterator[str]:
    """Yields the parts of the report."""
    records = content["records"]
    if content["settings"]["dry_run"]:
        yield DRY
    yield f"{describe_all(records)}."
    yield goal_table(records)
    yield parity_table(records)
    for record in records:
        found = record.get("result")
        if not found:
            continue
        plot = results.with_name(f"{results.stem}-{re.sub('[^a-z0-9.]+', '-', record['step'].lower())}.png")
        if record["kind"] == SERVING and found["records"]:
            yield f"### {record['step']}"
            yield serving_part(found, plot, page)
        elif record["kind"] == TRAINING and found["records"]:
            yield f"### {record['step']}"
            yield training_part(found, plot, page)
        elif record["kind"] == DISTILLED:
            yield f"### {record['step']}"
            yield speed_table(found)
    yield unfinished_table(records)


def goal_table(records: list[Record]) -> str:
    """Returns what the results are to show, and whether they do."""
    rows = [
        [
            goal.step,
            goal.what,
            f"{goal.found:.3f}",
            f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}",
            "yes" if goal.is_met else "**no**",
        ]
        for goal in goals(records)
    ]
    return markdown_table(["step", "figure", "found", "goal", "met"], rows) if rows else ""


def parity_table(records: list[Record]) -> str:
    """Returns how the answers of engines compare with those of transformers."""
    rows = []
    for record in records:
        if record["kind"] != PARITY or not (found := record.get("result")):
            continue
        base, ours = found["groups"]["base"], found["groups"]["prefixes"]
        equal = f"{ours['equal']} of {ours['answers']}" if found["dtype"] == "float32" else ""
        distances = (base["engine"], ours["engine"], ours["transformers"])
        rows.append([record["step"], equal, *(f"{each['mean']:.2g} ({each['max']:.2g})" for each in distances)])
    if not rows:
        return ""
    note = (
        "Answers with prefixes that equal those of `PeftModel.generate`; and distances of log-probabilities from the model in "
        "float32, mean (greatest): of the engine without prefixes, of the engine with them, and of transformers."
    )
    header = ["step", "equal answers", "engine, base", "engine, prefixes", "transformers, prefixes"]
    return f"{note}\n\n{markdown_table(header, rows)}"


def serving_part(content: Record, plot: Path, page: Path | None) -> str:
    """Returns the part of one step of serving, and saves its plot."""
    picture = ""
    if serving.headlines(content):
        serving.save_plot(content, plot)
        picture = image(plot, "Requests per second with a prefix, as ratios", page)
    return "\n\n".join(filter(None, [picture, serving.caption(content), serving.ratio_table(content)]))


def training_part(content: Record, plot: Path, page: Path | None) -> str:
    """Returns the part of one step of training, and saves its plot."""
    training.save_plot(content, plot)
    picture = image(plot, "Step time and memory by the number of virtual tokens", page)
    tables = map(training.cell_table, training.cells(content))
    return "\n\n".join([picture, training.caption(content), *tables])


def unfinished_table(records: list[Record]) -> str:
    """Returns the steps that did not end well, and why."""
    rows = [
        [record["step"], record["status"], record.get("reason", "")] for record in records if record["status"] != DONE
    ]
    return markdown_table(["step", "status", ""], rows) if rows else ""
