"""The results as tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import plots
from benchmarks.common.docs_pages import image, write_generated_part
from benchmarks.common.interleaving import ratio
from benchmarks.common.machine import describe_all
from benchmarks.common.results import Record
from benchmarks.common.tables import format_spread, markdown_table
from benchmarks.serving.comparisons import NO_PLUGIN, PREFIXES, SAME_ENGINE, TRANSPORTS, Ratio, count, ratios

FIELDS = {
    "tokens_per_second": "output tokens/s",
    "ttft_p50": "time to first token, p50",
    "itl_p50": "time per token, p50",
}
ABSOLUTE_FIELDS = {
    "tokens_per_second": "tokens/s",
    "ttft_p50": "TTFT p50, s",
    "ttft_p99": "TTFT p99, s",
    "itl_p50": "time per token, s",
    "blocks": "KV blocks",
    "cached_tokens": "cached tokens per request",
    "loads_per_request": "loads per request",
}


def write_report(results: Path, page: Path | None = None) -> str:
    """Saves the plot beside the results and writes the report into a page, if one is given.

    Returns:
        The report in Markdown.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    save_plot(content, plot)
    picture = image(plot, "Requests per second with a prefix, relative to LoRA and to cached text", page)
    text = "\n\n".join([picture, caption(content), ratio_table(content)])
    if page is not None:
        write_generated_part(page, "serving", text)
    return text


def caption(content: Record) -> str:
    """Returns the conditions of the measurements."""
    settings = content["settings"]
    return (
        f"{settings['model']}, {settings['dtype']}, KV cache blocks of {settings['block_size']} tokens, "
        f"{settings['input_tokens']} input and {settings['output_tokens']} output tokens. {settings['requests']} requests at "
        f"once, {settings['mix_requests']} when several adapters are mixed; over HTTP, {settings['concurrency']} concurrent "
        f"requests. Median (quartiles) of {settings['rounds']} interleaved rounds after each of {settings['starts']} engine "
        f"starts ({settings['base_starts']} for the base model); with LoRA and transformers, of {settings['slow_rounds']} "
        f"rounds after one start. {describe_all(content['records'])}."
    )


def ratio_table(content: Record) -> str:
    """Returns one row per ratio and transport."""
    rows = []
    for transport, found, measurements in _ratios(content):
        cells = [found.title, transport]
        for field in FIELDS:
            if field not in found.fields:
                cells.append("")
                continue
            value = ratio(measurements[found.ours], measurements[found.theirs], field)
            cells.append(format_spread(value, 3))
        rows.append(cells)
    return markdown_table(["ratio", "transport", *FIELDS.values()], rows)


def absolute_table(content: Record) -> str:
    """Returns a table of medians, which are comparable within one run on one machine only."""
    rows = [
        [record["transport"], record["comparison"], name, *(_median(rounds, field) for field in ABSOLUTE_FIELDS)]
        for record in content["records"]
        for name, rounds in record["measurements"].items()
    ]
    return markdown_table(["transport", "comparison", "candidate", *ABSOLUTE_FIELDS.values()], rows)


def headlines(content: Record) -> dict[str, float]:
    """Returns the ratios of throughput that the plot shows, by label; offline, if that was measured."""
    settings = content["settings"]
    measured: dict[tuple[str, str], float] = {}
    for _, one, measurements in _ratios(content):
        value = ratio(measurements[one.ours], measurements[one.theirs], "tokens_per_second")
        measured.setdefault((one.ours, one.theirs), value["median"])
    rank, length = settings["ranks"][0], settings["mix_tokens"]
    if length not in settings["lengths"]:
        length = settings["lengths"][-1]
    rows: dict[str, tuple[str, str]] = {}
    for number in settings["loras"]:
        prefixes, loras = count(number, "prefix", "prefixes"), count(number, "LoRA", "LoRA")
        rows[f"{prefixes} vs. {count(number, 'LoRA adapter', 'LoRA adapters')}"] = prefixes, f"{loras} of rank {rank}"
    rows["prefix vs. as much cached text"] = f"prefix of {length}", f"text of {length}{SAME_ENGINE}"
    rows["base model, with vs. without plugin"] = PREFIXES, NO_PLUGIN
    return {label: measured[pair] for label, pair in rows.items() if pair in measured}


def save_plot(content: Record, path: Path) -> None:
    """Plots `headlines` as bars."""
    settings, rows = content["settings"], headlines(content)
    place = content["records"][0]["machine"]
    device = place["accelerator"] or f"{place['cores']} CPU cores"
    subtitle = (
        f"{settings['model']}, {device}; {settings['mix_tokens']}-token prefixes, LoRA rank {settings['ranks'][0]}"
    )
    title = "Requests per second, as a ratio"
    with plots.plot(path, title, subtitle, height=1.4 + 0.4 * len(rows)) as (axes,):
        bars = axes.barh(range(len(rows)), list(rows.values()), 0.6, color=plots.OURS)
        labels = [f"{value:.2f}{plots.TIMES}" for value in rows.values()]
        axes.bar_label(bars, labels, padding=6, color=plots.OURS, weight="bold")
        axes.axvline(1, color=plots.DARK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(1, len(rows) - 0.4, "equal", color=plots.DARK, ha="center", va="top")
        axes.set_yticks(range(len(rows)), list(rows), color=plots.TEXT)
        axes.set(ylim=(len(rows) - 0.4, -0.5), xticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)


def _median(rounds: list[Record], field: str) -> str:
    return f"{median(values):.4g}" if (values := [one[field] for one in rounds if field in one]) else ""


def _ratios(content: Record) -> Iterator[tuple[str, Ratio, dict[str, Any]]]:
    for transport in TRANSPORTS:
        for record in content["records"]:
            if record["transport"] == transport:
                for found in ratios(content["settings"], record["comparison"]):
                    yield transport, found, record["measurements"]
