"""The output of the demo: a table of answers, and a plot of the losses."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 38) -> str:
    """Returns a text table whose cells are wrapped to `width` characters."""
    rule = "+".join("-" * (width + 2) for _ in header)
    blocks = [_row(header, width), *(_row(row, width) for row in rows)]
    return f"\n{rule}\n".join(blocks)


def save_losses(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plots the loss of each task by training step, with its running mean."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (task, values) in enumerate(losses.items()):
        axes.plot(range(1, len(values) + 1), values, color=f"C{number}", alpha=0.3)
        axes.plot(range(1, len(values) + 1), running_mean(values, window=10), color=f"C{number}", label=task)
    axes.set(xlabel="step", ylabel="loss per token of the answer", title="Training the prefixes")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns the mean of each value and up to `window - 1` before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _row(cells: Sequence[str], width: int) -> str:
    wrapped = [textwrap.wrap(cell, width) or [""] for cell in cells]
    height = max(len(lines) for lines in wrapped)
    padded = [lines + [""] * (height - len(lines)) for lines in wrapped]
    lines = (" | ".join(line.ljust(width) for line in row) for row in zip(*padded, strict=True))
    return "\n".join(f" {line}".rstrip() for line in lines)
