"""The results of `serving.py` as a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.docs_pages import put, table
from benchmarks.common.interleaving import ratio, shown
from benchmarks.common.machine import titles
from benchmarks.common.results import Record
from benchmarks.serving.comparisons import TRANSPORTS, Ratio, ratios

FIELDS = {
    "tokens_per_second": "output tokens/s",
    "ttft_p50": "time to first token, p50",
    "itl_p50": "time per token, p50",
}


def write_report(results: Path, readme: Path | None) -> str:
    """Returns caption and table in Markdown, after writing a plot beside the results, and both to a README if one is given."""
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    save_plot(content, plot)
    picture = f"![Output tokens per second, as ratios](benchmarks/{plot.name})"
    text = "\n\n".join([caption(content), ratio_table(content), picture])
    if readme is not None:
        put(readme, "serving", text)
    return text


def caption(content: Record) -> str:
    """Returns under which conditions the results were made."""
    settings = content["settings"]
    return (
        f"{settings['model']}, {settings['dtype']}, blocks of {settings['block_size']} tokens, {settings['input_tokens']} "
        f"tokens in and {settings['output_tokens']} out; {settings['requests']} requests at once, {settings['mix_requests']} "
        f"in mixes of adapters (over HTTP {settings['concurrency']} at a time). Medians and quartiles of "
        f"{settings['rounds']} interleaved rounds in each of {settings['starts']} starts of the engines "
        f"({settings['base_starts']} for the base model); of "
        f"{settings['slow_rounds']} rounds in one with LoRA and transformers. {titles(content['records'])}."
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
            cells.append(shown(value, 3))
        rows.append(cells)
    return table(["ratio", "", *FIELDS.values()], rows)


def save_plot(content: Record, path: Path) -> None:
    """Saves a picture of the ratios of output tokens per second, a bar each, with their quartiles."""
    rows = []
    for transport, found, measurements in _ratios(content):
        value = ratio(measurements[found.ours], measurements[found.theirs], "tokens_per_second")
        rows.append((f"{found.title}{' (HTTP)' if transport == 'http' else ''}".replace("`", ""), value))
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(rows)))
    for place, (_, value) in enumerate(reversed(rows)):
        middle, (low, high) = value["median"], value["quartiles"]
        # From 1 on; slower is another color, if most rounds say so.
        color = "C1" if high < 1 else "C0"
        axes.barh(place, middle - 1, left=1, color=color, xerr=[[middle - low], [high - middle]], capsize=2)
        axes.annotate(f" {middle:.2f}", (max(high, middle, 1), place), va="center", fontsize="small")
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="output tokens per second, ratio", ylim=(-1, len(rows)))
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind("{x:g}")
    axes.margins(x=0.1)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def absolute(content: Record) -> str:
    """Returns a table of the medians themselves, which hold for one machine and one run only."""
    rows = [
        [record["transport"], record["comparison"], name, *(_median(rounds, field) for field in _FIGURES)]
        for record in content["records"]
        for name, rounds in record["measurements"].items()
    ]
    return table(["", "comparison", "candidate", *_FIGURES.values()], rows)


_FIGURES = {
    "tokens_per_second": "tokens/s",
    "ttft_p50": "TTFT p50, s",
    "ttft_p99": "TTFT p99, s",
    "itl_p50": "time per token, s",
    "blocks": "KV blocks",
    "cached_tokens": "cached tokens per request",
    "loads_per_request": "loads per request",
}


def _median(rounds: list[Record], field: str) -> str:
    return f"{median(values):.4g}" if (values := [one[field] for one in rounds if field in one]) else ""


def _ratios(content: Record) -> Iterator[tuple[str, Ratio, dict[str, Any]]]:
    for transport in TRANSPORTS:
        for record in content["records"]:
            if record["transport"] == transport:
                for found in ratios(content["settings"], record["comparison"]):
                    yield transport, found, record["measurements"]
