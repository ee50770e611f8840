"""The results as tables and a plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common import plots
from benchmarks.common.docs_pages import image, write_generated_part
from benchmarks.common.results import Record
from benchmarks.common.tables import markdown_table
from benchmarks.quality.methods import Method, variants
from benchmarks.quality.rates import RATES_NAME, rates_section

HEADER = ["method", "trained parameters", "learning rate"]
# The methods of the plot, with their labels and colours.
LINES = {
    "ours-mlp-exemplars": ("prefix, from exemplars", plots.OURS),
    "lora-r8": ("LoRA, rank 8", plots.DARK),
    "stock-mlp": ("stock PEFT prefix tuning", plots.GREY),
}


def write_report(results: Path, methods: Sequence[Method], page: Path | None = None) -> str:
    """Saves the plot beside the results and writes the report into a page, if one is given.

    Returns:
        The report in Markdown.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    save_plot(content, methods, plot)
    parts = [
        image(plot, "BLEU by the number of training rows", page),
        caption(content["settings"]),
        score_table(content, methods),
        variant_table(content, methods[0]),
    ]
    if (rates := results.with_name(RATES_NAME)).exists():
        parts.append(rates_section(rates, page))
    text = "\n\n".join(filter(None, parts))
    if page is not None:
        write_generated_part(page, "quality", text)
    return text


def caption(settings: Record) -> str:
    """Returns the conditions of the runs."""
    budgets = "; ".join(
        f"{_name(size)} rows: {size['steps']} steps, {size['tests']} meaning representations scored"
        for size in settings["sizes"]
    )
    text = (
        f"{settings['model']} in {settings['dtype']}, batch size {settings['batch_size']}. {budgets.capitalize()}. Greedy "
        f"decoding. Each learning rate is the best of its candidates on held-out rows. Mean ± standard deviation over "
        f"{len(settings['seeds'])} seeds."
    )
    return textwrap.fill(text, 120)


def score_table(content: Record, methods: Sequence[Method]) -> str:
    """Returns one row per method: BLEU for each number of rows, and the other scores for all rows.

    A cell is the mean over the seeds with the standard deviation, and the number of seeds while some are missing.
    """
    settings = content["settings"]
    sizes = [_name(size) for size in reversed(settings["sizes"])]
    header = [*HEADER, *(f"BLEU, {size} rows" for size in sizes), "NIST, all rows", "ROUGE-L, all rows"]
    base = _base_scores(content)
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
    return markdown_table(header, rows)


def variant_table(content: Record, method: Method) -> str:
    """Returns the held-out loss of a method and of its variants, or an empty string if no variant was measured."""
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
    header = [f"change to {method.title} (seed {seed})", "loss on held-out rows"]
    return markdown_table(header, [["nothing", f"{own[0]['held_out_loss']:.3f}"], *rows]) if rows else ""


def save_plot(content: Record, methods: Sequence[Method], path: Path) -> None:
    """Plots BLEU by the number of rows: a line per method of `LINES` and one for the base model."""
    settings = content["settings"]
    sizes = [_name(size) for size in reversed(settings["sizes"])]
    lines = [([_base_scores(content)["bleu"]] * len(sizes), "base model", plots.GREY)]
    for method in methods:
        values = [[run["scores"]["bleu"] for run in _runs(content, method, size)] for size in sizes]
        if method.name in LINES and all(values):
            lines.append(([mean(scores) for scores in values], *LINES[method.name]))
    places = range(len(sizes))
    title, seeds = "BLEU on E2E by training rows", len(settings["seeds"])
    subtitle = f"{settings['model']}, mean of {seeds} seeds; stock PEFT prefix tuning with prefix_projection=True"
    with plots.plot(path, title, subtitle, height=4) as (axes,):
        axes.plot(places, lines[0][0], ":", color=plots.GREY, linewidth=2)
        for means, _, color in lines[1:]:
            plots.line(axes, means, color)
        plots.label_points(
            axes, -0.05, [(means[0], f"{means[0]:.1f}", color) for means, _, color in lines], 4.5, "right"
        )
        ends = [(means[-1], f"{means[-1]:.1f}  {label}", color) for means, label, color in lines]
        plots.label_points(axes, places[-1] + 0.05, ends, 4.5, "left")
        axes.set_xticks(places, [f"{size} rows" for size in sizes])
        axes.set(xlim=(-0.25, places[-1] + 0.95), ylim=(0, None), yticks=[])
        axes.spines["left"].set_visible(False)


def _base_scores(content: Record) -> Record:
    return next(record["scores"] for record in content["records"] if record["kind"] == "base")


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
