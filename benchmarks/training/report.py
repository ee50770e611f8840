"""The results as tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib.ticker import MultipleLocator

from benchmarks.common import plots
from benchmarks.common.docs_pages import image, write_generated_part
from benchmarks.common.machine import describe_all
from benchmarks.common.results import Record
from benchmarks.common.tables import format_spread, markdown_table
from benchmarks.training.steps import LIMIT, METHODS, STOCK_FLAT, STOCK_MLP

MIB = 2**20
NOTE = (
    "`ours` is `PREFIX_EXT`. `limit` is the frozen model: its forward pass and the gradient of its input. Stock PEFT refuses "
    "gradient checkpointing with prefix tuning. Memory excludes weights and optimizer state: kept for the backward pass, and "
    "peak."
)
# The methods of the plot, as their libraries configure them by default, with their labels and colours.
LINES = {
    "ours, MLP": ("prefix", plots.OURS),
    STOCK_FLAT: ("stock PEFT\nprefix tuning", plots.GREY),
    "LoRA, rank 8": ("LoRA, rank 8", plots.DARK),
}


def write_report(results: Path, page: Path | None = None) -> str:
    """Saves the plot beside the results and writes the report into a page, if one is given.

    The page gets the cells of the largest batch only.

    Returns:
        The report in Markdown, with all cells.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    plot = results.with_suffix(".png")
    save_plot(content, plot)
    picture = image(plot, "Step time and memory by the number of virtual tokens", page)
    found = cells(content)
    if page is not None:
        write_generated_part(page, "training", _text(content, largest_batch(content), picture))
    return _text(content, found, picture)


def _text(content: Record, shown_cells: Iterable[Record], picture: str) -> str:
    return "\n\n".join([picture, caption(content), *map(cell_table, shown_cells), NOTE])


def cells(content: Record) -> list[Record]:
    """Returns the records by batch and prefix."""
    return sorted(content["records"], key=lambda record: (record["batch"], record["prefix"]))


def largest_batch(content: Record) -> list[Record]:
    """Returns the records of the largest batch by prefix."""
    found = cells(content)
    return [cell for cell in found if cell["batch"] == found[-1]["batch"]]


def caption(content: Record) -> str:
    """Returns the conditions of the measurements."""
    settings = content["settings"]
    layers = "" if settings["layers"] is None else f" with {settings['layers']} of its layers"
    threads = f", {settings['threads']} threads" if settings["device"] == "cpu" else ""
    attention = f", {settings['attention']}" if settings.get("attention") else ""
    compiled = ", torch.compile" if settings.get("compiled") else ""
    return (
        f"{settings['model']}{layers}, {settings['dtype']}{threads}{attention}{compiled}, rows of {settings['length']} tokens. Step times are ratios: "
        f"median (quartiles) of {settings['rounds']} interleaved rounds. {describe_all(content['records'])}."
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
        if (method := cell["methods"].get(name)) is None:
            continue
        ratios = [format_spread(method["ratios"][other], 2) for other in (LIMIT, STOCK_FLAT, STOCK_MLP)]
        rows.append([name, *ratios, *(f"{method[field] / MIB:.0f}" for field in ("saved", "peak"))])
    return markdown_table(header, rows)


def save_plot(content: Record, path: Path) -> None:
    """Plots step time and memory at the largest batch, relative to the frozen model, by the number of virtual tokens."""
    found, settings = largest_batch(content), content["settings"]
    title = "Cost of a training step (frozen model = 1)"
    subtitle = f"{settings['model']}, batch size {found[0]['batch']}, rows of {settings['length']} tokens"
    places = range(len(found))
    with plots.plot(path, title, subtitle, height=4, columns=2, share_y=True) as panels:
        for axes, kind in zip(panels, ("time", "activation memory"), strict=True):
            ends = []
            for name, (label, color) in LINES.items():
                methods = [cell["methods"][name] for cell in found]
                limits = [cell["methods"][LIMIT] for cell in found]
                if kind == "time":
                    values = [method["ratios"][LIMIT]["median"] for method in methods]
                else:
                    values = [method["saved"] / limit["saved"] for method, limit in zip(methods, limits, strict=True)]
                plots.line(axes, values, color)
                ends.append((values[-1], f"{values[-1]:.1f}{plots.TIMES}  {label}", color))
            axes.hlines(1, 0, places[-1], color=plots.LIGHT, zorder=0)
            plots.label_points(axes, places[-1] + 0.12, ends, 0.3, "left")
            axes.set_title(kind)
            axes.set_xticks(places, [str(cell["prefix"]) for cell in found])
            axes.set_xlabel("virtual tokens", loc="left")
            axes.set_xlim(-0.2, places[-1] + 1.7)
            axes.yaxis.set_major_locator(MultipleLocator(1))
            axes.yaxis.set_major_formatter(f"{{x:.0f}}{plots.TIMES}")
            axes.spines[["left", "bottom"]].set_visible(False)
        panels[0].set_ylim(bottom=0.8)
