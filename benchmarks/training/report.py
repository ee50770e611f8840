"""The results of `training.py` as a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.docs_pages import put, table
from benchmarks.common.interleaving import shown
from benchmarks.common.machine import titles
from benchmarks.common.results import Record
from benchmarks.training.steps import LIMIT, METHODS, STOCK_FLAT, STOCK_MLP

MIB = 2**20
NOTE = (
    "Stock PEFT refuses gradient checkpointing with prefix tuning: ours with checkpointing is compared with stock without. "
    "Memory is what a step needs beside weights and optimizer: kept for the backward pass, and at its peak."
)


def write_report(results: Path, readme: Path | None) -> str:
    """Returns caption and tables in Markdown, after writing a plot beside the results.

    Args:
        readme: Where all but the tables of the smaller batches go, if anywhere.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    save_plot(content, plot)
    picture = f"![Time and memory of a training step, to stock PEFT's](benchmarks/{plot.name})"
    found = cells(content)
    if readme is not None:
        largest = [cell for cell in found if cell["batch"] == found[-1]["batch"]]
        put(readme, "training", _text(content, largest, picture))
    return _text(content, found, picture)


def _text(content: Record, shown_cells: Iterable[Record], picture: str) -> str:
    return "\n\n".join([caption(content), *map(cell_table, shown_cells), NOTE, picture])


def cells(content: Record) -> list[Record]:
    """Returns the records by batch and prefix."""
    return sorted(content["records"], key=lambda record: (record["batch"], record["prefix"]))


def caption(content: Record) -> str:
    """Returns under which conditions the results were made."""
    settings = content["settings"]
    layers = "" if settings["layers"] is None else f" with {settings['layers']} of its layers"
    threads = f", {settings['threads']} threads" if settings["device"] == "cpu" else ""
    return (
        f"{settings['model']}{layers}, {settings['dtype']}{threads}, rows of {settings['length']} tokens. Step time as a ratio: "
        f"median (quartiles) of {settings['rounds']} interleaved rounds. {titles(content['records'])}."
    )


def cell_table(cell: Record) -> str:
    """Returns the table of a cell, a row per method."""
    header = [
        f"batch {cell['batch']}, prefix {cell['prefix']}",
        "step / limit",
        "/ PEFT flat",
        "/ PEFT MLP",
        "kept, MiB",
        "peak, MiB",
    ]
    rows = []
    for name in METHODS:
        method = cell["methods"][name]
        ratios = [shown(method["ratios"][other], 2) for other in (LIMIT, STOCK_FLAT, STOCK_MLP)]
        rows.append([name, *ratios, *(f"{method[field] / MIB:.0f}" for field in ("saved", "peak"))])
    return table(header, rows)


def save_plot(content: Record, path: Path) -> None:
    """Saves a picture: in each cell, every method's step time and kept memory, over those of stock PEFT's flat prefix."""
    found = cells(content)
    names = [name for name in METHODS if name != STOCK_FLAT]
    figure, axes = plt.subplots(2, 1, figsize=(max(8, 1.4 * len(found)), 8), sharex=True)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(found))]
        times = [cell["methods"][name]["ratios"][STOCK_FLAT] for cell in found]
        middles = [time["median"] for time in times]
        spreads = [
            [time["median"] - time["quartiles"][0] for time in times],
            [time["quartiles"][1] - time["median"] for time in times],
        ]
        axes[0].bar(places, middles, width, yerr=spreads, label=name, color=f"C{number}", error_kw={"linewidth": 0.8})
        kept = [cell["methods"][name]["saved"] / cell["methods"][STOCK_FLAT]["saved"] for cell in found]
        axes[1].bar(places, kept, width, color=f"C{number}")
    for part, label in zip(axes, ("step time", "memory kept for the backward pass"), strict=True):
        part.axhline(1, color="black", linewidth=0.8)
        part.set_ylabel(f"{label}\n(PEFT prefix tuning, flat = 1)")
        part.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(found)), [f"batch {cell['batch']}\nprefix {cell['prefix']}" for cell in found])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
