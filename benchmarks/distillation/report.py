"""The results as tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.docs_pages import image, write_generated_part
from benchmarks.common.interleaving import ratio
from benchmarks.common.machine import describe_all
from benchmarks.common.results import Record
from benchmarks.common.tables import format_spread, markdown_table
from benchmarks.distillation.document_report import document_tables, save_plot
from benchmarks.distillation.shares import spread
from benchmarks.distillation.tasks import many_shot, speed, step, together

NO_RESULTS = "Not measured yet."
SPEED_ROWS = {
    speed.UNCACHED: "full context, as text that no cache holds",
    speed.CACHED: "full context, as cached text",
    speed.COMPILED: "full context, as its exact prefix",
}


def write_report(results: Path, page: Path | None = None) -> str:
    """Saves the plot beside the results and writes the report into a page, if one is given.

    Returns:
        The report in Markdown; without results it says so.
    """
    text = NO_RESULTS
    if results.exists():
        content = json.loads(results.read_text(encoding="utf-8"))
        plot = results.with_suffix(".png")
        picture = image(plot, "Recovered share by the length of the prefix", page) if save_plot(content, plot) else ""
        sections = [section(content) for section in SECTIONS]
        text = "\n\n".join(filter(None, [picture, caption(content), *sections])) or NO_RESULTS
    if page is not None:
        write_generated_part(page, "distillation", text)
    return text


def caption(content: Record) -> str:
    """Returns the conditions of all measurements."""
    settings, records = content["settings"], content["records"]
    if not records:
        return ""
    return (
        f"{settings['model']}, {settings['dtype']}, MLP, batch size {settings['batch_size']}; mean (least to greatest) over "
        f"seeds where there are several. {describe_all(records)}."
    )


def many_shot_table(content: Record) -> str:
    """Returns BLEU by row with its recovered share, a column for each seed and one for the mean."""
    records = sorted(_of(content, many_shot.TASK), key=lambda record: record["seed"])
    if not records:
        return ""
    settings = content["settings"]
    names = dict.fromkeys(name for record in records for name in record["rows"])
    order = ["nothing", "one shot", "fewer shots", many_shot.FEW, "full context", "distilled"]
    rows = []
    for name in sorted(names, key=order.index):
        found = [record["rows"].get(name) for record in records]
        shares = [share for record in records if (share := _bleu_share(record, name)) is not None]
        rows.append(
            [
                name,
                spread([each["tokens"] for each in found if each], 0),
                *("" if each is None else f"{each['score']:.1f}" for each in found),
                spread([each["score"] for each in found if each], 1),
                "" if name == "nothing" else spread(shares, 2),
            ]
        )
    header = ["", "tokens", *(f"seed {record['seed']}" for record in records), "mean", "recovered"]
    return "\n\n".join(
        [
            "### Many-shot",
            f"BLEU on {settings['num_tests']} tests. {settings['num_shots']} worked examples, {settings['num_inputs']} inputs "
            f"without answers, {settings['many_shot_steps']} steps. Each seed draws all of them anew. The recovered share is "
            "computed for each seed.",
            markdown_table(header, rows),
        ]
    )


def together_table(content: Record) -> str:
    """Returns the share of right choices and the log-probability by the number of prefixes, apart and with the others."""
    records = _of(content, together.TASK)
    if not records:
        return ""
    settings = content["settings"]
    rows = []
    for number in sorted({record["number"] for record in records}):
        found = [record["rows"] for record in records if record["number"] == number]
        for name in found[0]:
            values = [
                spread([each[name][field] for each in found], digits)
                for field, digits in (("choice", 2), ("logprob", 2))
            ]
            rows.append([name, str(number or ""), *values])
    return "\n\n".join(
        [
            "### Together",
            f"{settings['num_sheets']} fact sheets of {settings['people_per_sheet']} people, each distilled into "
            f"{settings['together_tokens']} tokens, then put behind one another. Mean over the questions of all sheets.",
            markdown_table(["", "prefixes", "right choices", "log-probability"], rows),
        ]
    )


def speed_section(content: Record) -> str:
    """Returns `speed_table` with a heading, if it was measured."""
    return f"### Speed\n\n{found}" if (found := speed_table(content)) else ""


def speed_table(content: Record) -> str:
    """Returns the ratios of a distilled prefix to the ways to give the full context, and their conditions."""
    records = _of(content, speed.TASK)
    if not records:
        return ""
    settings, measurements = content["settings"], records[-1]["measurements"]
    ours = measurements[speed.DISTILLED]
    fields = (speed.RATE, "ttft_p50", speed.FIRST_ALONE)
    rows = [
        [title, *(format_spread(ratio(ours, measurements[name], field), 3) for field in fields)]
        for name, title in SPEED_ROWS.items()
    ]
    header = ["distilled prefix / ...", "output tokens/s", "time to first token", "the same, one request"]
    return "\n\n".join(
        [
            f"A prefix of {settings['prefix_tokens']} tokens against {settings['context_tokens']} tokens of context: "
            f"{settings['requests']} requests at once, {settings['input_tokens']} input and {settings['output_tokens']} output "
            f"tokens, {settings['speed_dtype']}. Median (quartiles) of {settings['speed_rounds']} interleaved rounds.",
            markdown_table(header, rows),
        ]
    )


def step_table(content: Record) -> str:
    """Returns the ratio of a training step to a plain one."""
    records = _of(content, step.TASK)
    if not records:
        return ""
    settings, measurements = content["settings"], records[-1]["measurements"]
    found = ratio(measurements[step.DISTILLATION], measurements[step.PLAIN], step.SECONDS)
    return "\n\n".join(
        [
            "### Training step",
            f"{settings['batch_size']} rows of {settings['step_length']} tokens, {settings['prefix_tokens']} virtual tokens. "
            f"Median (quartiles) of {settings['step_rounds']} interleaved rounds.",
            markdown_table(["distillation / plain training", ""], [["time of a step", format_spread(found, 3)]]),
        ]
    )


SECTIONS: tuple[Callable[[Record], str], ...] = (
    many_shot_table,
    document_tables,
    together_table,
    speed_section,
    step_table,
)


def _of(content: Record, task: str) -> list[Record]:
    return [record for record in content["records"] if record["task"] == task]


def _bleu_share(record: Record, name: str) -> float | None:
    """Returns the recovered share of a row by BLEU, `None` without such a row, or if nothing and the full context do not separate."""
    interval = record["intervals"]["score"]
    if name not in record["rows"] or interval is None or interval[0] <= 0:
        return None
    ours, nothing, full = (record["rows"][row]["score"] for row in (name, "nothing", "full context"))
    return float((ours - nothing) / (full - nothing))
