"""Held-out loss by learning rate: at the defaults of trainers, at those that people use for LoRA, and at those of prefixes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import plots
from benchmarks.common.docs_pages import image
from benchmarks.common.results import Record
from benchmarks.common.tables import markdown_table
from benchmarks.quality.benchmark import Benchmark, Run, Settings
from benchmarks.quality.methods import METHODS, Method

# The defaults of TRL's `SFTTrainer` and of `Trainer`, LoRA's usual rate, and those that suit a prefix with and without an MLP.
RATES = (2e-5, 5e-5, 2e-4, 2e-3, 2e-2)
RATES_NAME = "rates.json"  # beside the results of the benchmark
TASKS = {"describe": "write a sentence with the facts", "parse": "find the facts in a sentence"}
OURS, LORA, STOCK = "ours", "LoRA", "PEFT prefix tuning"
_METHODS = {method.name: method for method in METHODS}


def _as_they_are(name: str, title: str) -> Method:
    method = _METHODS[name]
    return replace(method, name=f"{name}-default", title=title, options={**method.options, "min_learning_rate": None})


# By their labels. Those of this project have their own defaults, so that low rates are raised.
COMPARED = {
    "ours, MLP": _as_they_are("ours-mlp-exemplars", OURS),
    "ours, flat": _as_they_are("ours-flat-exemplars", OURS),
    "ours, flat, as given": replace(_METHODS["ours-flat-exemplars"], title=STOCK),
    "LoRA, rank 8": replace(_METHODS["lora-r8"], title=LORA),
    "PEFT prefix tuning, MLP": replace(_METHODS["stock-mlp"], title=STOCK),
}
COLORS = {OURS: plots.OURS, LORA: plots.DARK, STOCK: plots.GREY}


def run_rates(data: Path, settings: Settings, results: Path, rates: Sequence[float] = RATES) -> None:
    """Measures each method at each rate on both tasks, unless there is a record, with the first seed."""
    for task in TASKS:
        benchmark = Benchmark(data, settings, results, reverse=task == "parse")
        for label, method in COMPARED.items():
            for rate in rates:
                run = Run(method, settings.search, settings.seeds[0])
                key = {"kind": "rate", "task": task, "label": label, **run.key, "learning_rate": rate}
                if benchmark.results.find(**key):
                    continue
                model, _ = benchmark.train(run, rate)
                benchmark.results.add({**key, "held_out_loss": (loss := benchmark.held_out_loss(model))})
                print(f"{task}, {label}, {rate:g}: {loss}", flush=True)


def rates_section(results: Path, page: Path | None = None) -> str:
    """Saves the plot beside the results.

    Args:
        results: The results file of `run_rates`.
        page: The page that will show the plot, if any.

    Returns:
        The plot and the tables in Markdown.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    _save_plot(content, plot)
    tables = [_table(content, task) for task in TASKS if _losses(content, task)]
    return "\n\n".join(["### By learning rate", image(plot, "Held-out loss by learning rate", page), *tables])


def _losses(content: Record, task: str) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    for record in content["records"]:
        if record["task"] == task:
            found.setdefault(record["label"], {})[record["learning_rate"]] = record["held_out_loss"]
    return found


def _table(content: Record, task: str) -> str:
    losses = _losses(content, task)
    rates = sorted({rate for row in losses.values() for rate in row})
    rows = []
    for label, row in losses.items():
        best = min(row.values())
        farthest = max(row[rate] - best for rate in row if rate <= 2e-4) if min(row) <= 2e-4 else None
        cells = [f"{row[rate]:.3f}" if rate in row else "" for rate in rates]
        rows.append([label, *cells, "" if farthest is None else f"{farthest:.3f}"])
    settings = content["settings"]
    steps, pairs = settings["search"]["steps"], settings["search"]["rows"]
    return "\n\n".join(
        [
            f"**{TASKS[task].capitalize()}**: loss on held-out rows, nats per token. {settings['model']} in "
            f"{settings['dtype']}, {pairs} rows, {steps} steps, seed {settings['seeds'][0]}.",
            markdown_table(
                ["learning rate", *(f"{rate:g}" for rate in rates), "farthest from its best at 2e-5 to 2e-4"], rows
            ),
        ]
    )


def _save_plot(content: Record, path: Path) -> None:
    shown = {task: losses for task in TASKS if (losses := _losses(content, task))}
    title, subtitle = "Held-out loss by learning rate", f"{content['settings']['model']}; lower is better"
    with plots.plot(path, title, subtitle, height=4, columns=max(1, len(shown)), share_y=True) as columns:
        for axes, (task, losses) in zip(columns, shown.items(), strict=False):
            ends = []
            for label, row in losses.items():
                color = COLORS[COMPARED[label].title]
                plots.line(axes, [row[rate] for rate in sorted(row)], color)
                ends.append((row[max(row)], label, color))
            places = range(len(row))
            span = max(y for row in losses.values() for y in row.values()) - min(y for y, _, _ in ends)
            plots.label_points(axes, places[-1] + 0.15, ends, 0.08 * max(span, 0.01), "left")
            axes.set_xticks(places, [f"{rate:g}" for rate in sorted(row)])
            axes.set(xlim=(-0.2, places[-1] + 3.2), xlabel="learning rate")
            axes.set_title(TASKS[task].capitalize())
