"""The results as a table and a plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.docs_pages import put
from benchmarks.common.docs_pages import table as markdown
from benchmarks.common.results import Record
from benchmarks.quality.methods import Method, variants

HEADER = ["method", "trained numbers", "learning rate"]


def write_report(results: Path, methods: Sequence[Method], plot: Path, readme: Path) -> str:
    """Returns caption and table in Markdown, after writing them between the markers in `readme` and a picture to `plot`."""
    content = json.loads(results.read_text(encoding="utf-8"))
    parts = [caption(content["settings"]), table(content, methods), f"![BLEU by rows](benchmarks/{plot.name})"]
    text = "\n\n".join(filter(None, [*parts, variant_table(content, methods[0])]))
    save_plot(content, methods, plot)
    put(readme, "quality", text)
    return text


def caption(settings: Record) -> str:
    """Returns under which budget the results were made."""
    budgets = "; ".join(
        f"{_name(size)} rows: {size['steps']} steps, scored on {size['tests']} meaning representations"
        for size in settings["sizes"]
    )
    text = (
        f"{settings['model']} in {settings['dtype']}, {settings['batch_size']} rows a step. {budgets.capitalize()}. Greedy "
        "answers. Each method has its own learning rate, of its candidates the one with the smallest loss on rows that "
        f"nothing trains on. Mean ± standard deviation over {len(settings['seeds'])} seeds, or over as many as are done."
    )
    return textwrap.fill(text, 120)


def table(content: Record, methods: Sequence[Method]) -> str:
    """Returns one row per method: BLEU for each number of rows, the other scores for the whole of the training set.

    A cell is the mean over the seeds, with the standard deviation if there is more than one, and the number of seeds
    where not all of them are done.
    """
    settings = content["settings"]
    sizes = [_name(size) for size in reversed(settings["sizes"])]
    header = [*HEADER, *(f"BLEU, {size} rows" for size in sizes), "NIST, all rows", "ROUGE-L, all rows"]
    base = next(record["scores"] for record in content["records"] if record["kind"] == "base")
    blanks = [""] * (len(sizes) - 1)
    scores = _cell([base["bleu"]], 1), f"{base['nist']:.2f}", f"{base['rouge_l']:.1f}"
    rows = [["base model", "", "", *blanks, *scores]]
    for method in methods:
        runs = [_runs(content, method, size) for size in sizes]
        done = [run for group in runs for run in group]
        if not done:
            continue
        seeds = len(settings["seeds"])
        cells = [_cell([run["scores"]["bleu"] for run in group], seeds) for group in runs]
        cells += [
            _cell([run["scores"][name] for run in runs[-1]], seeds, digits)
            for name, digits in (("nist", 2), ("rouge_l", 1))
        ]
        rows.append([method.title, f"{done[0]['trained']:,}", f"{done[0]['learning_rate']:g}", *cells])
    return markdown(header, rows)


def variant_table(content: Record, method: Method) -> str:
    """Returns the held-out loss of a method and of its variants, or nothing when none was measured."""
    settings = content["settings"]
    seed = settings["seeds"][0]
    own = [run for run in _runs(content, method, _name(settings["sizes"][0])) if run["seed"] == seed]
    if not own:
        return ""
    rows = []
    for variant in variants(method, own[0]["learning_rate"]):
        wanted = {"kind": "variant", "options": variant.options, "learning_rate": own[0]["learning_rate"]}
        found = [record for record in content["records"] if wanted.items() <= record.items()]
        rows += [[variant.title, f"{record['held_out_loss']:.3f}"] for record in found]
    header = [f"{method.title}, changed (seed {seed})", "loss on held-out rows"]
    return markdown(header, [["nothing", f"{own[0]['held_out_loss']:.3f}"], *rows]) if rows else ""


def save_plot(content: Record, methods: Sequence[Method], path: Path) -> None:
    """Saves a picture of BLEU by the number of rows: a point per run, a line through each method's means."""
    sizes = [_name(size) for size in reversed(content["settings"]["sizes"])]
    figure, axes = plt.subplots(figsize=(8, 5))
    styles = {"ours": "-", "stock": ":", "lora": "--"}
    shown = [method for method in methods if any(_runs(content, method, size) for size in sizes)]
    for number, method in enumerate(shown):
        color = f"C{number}"
        means = []
        for place, size in enumerate(sizes):
            values = [run["scores"]["bleu"] for run in _runs(content, method, size)]
            axes.plot([place] * len(values), values, ".", color=color, alpha=0.5)
            means += [(place, mean(values))] if values else []
        style = styles[method.name.split("-")[0]]
        axes.plot(*zip(*means, strict=True), style, marker="o", color=color, label=method.title)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlabel="rows to train on", ylabel="BLEU", title="E2E, SmolLM2-135M-Instruct, one budget for all")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _runs(content: Record, method: Method, size: str) -> list[Record]:
    wanted = {"kind": "run", "method": method.name, "options": method.options, "size": size}
    return [record for record in content["records"] if wanted.items() <= record.items()]


def _name(size: Record) -> str:
    return "all" if size["rows"] is None else str(size["rows"])


def _cell(values: Sequence[float], seeds: int, digits: int = 1) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")
