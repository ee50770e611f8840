"""The style of all plots: ours in one colour, everything else in greys, labels instead of a legend.

The background is opaque white, so that a plot is legible on dark pages, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

OURS, TEXT, DARK, GREY, LIGHT = "#0969da", "#1f2328", "#424a53", "#6e7781", "#d8dee4"
TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH = 9.0  # inches of 100 pixels on a page; images have twice the resolution
STYLE: Any = {
    "font.size": 12,
    "text.color": TEXT,
    "axes.labelcolor": DARK,
    "axes.edgecolor": LIGHT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def plot(
    path: Path, title: str, subtitle: str, *, height: float, columns: int = 1, share_y: bool = False
) -> Iterator[list[Axes]]:
    """Yields empty axes from left to right, and saves their figure when the block ends.

    Args:
        path: The image file.
        title: What is measured.
        subtitle: Under which conditions.
        height: In inches, of `WIDTH` by `height`.
        columns: The number of axes.
        share_y: Whether they have the same scale.
    """
    layout: Any = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.8 / height))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(WIDTH, height), squeeze=False, sharey=share_y, layout=layout)
        figure.text(0.005, 1 - 0.1 / height, title, va="top", weight="bold", size=15)
        figure.text(0.005, 1 - 0.42 / height, subtitle, va="top", color=DARK, size=11)
        yield list(axes[0])
        figure.savefig(path, dpi=200)
        plt.close(figure)


def line(axes: Axes, values: Sequence[float], color: str) -> None:
    """Draws a line with points at x = 0, 1, ...; ours is thicker and in front."""
    ours = color == OURS
    axes.plot(
        range(len(values)), values, "-o", color=color, linewidth=3.5 if ours else 2, markersize=8, zorder=2 + ours
    )


def label_points(
    axes: Axes, x: float, points: Sequence[tuple[float, str, str]], gap: float, align: Literal["left", "right"]
) -> None:
    """Writes labels beside points that have the same x.

    Args:
        axes: The axes.
        x: The x of the labels.
        points: The y, the text and the colour of each label.
        gap: The minimum distance of two labels in units of y; closer labels move apart.
        align: The side of the text that is at x.
    """
    order = sorted(range(len(points)), key=lambda index: points[index][0])
    places = [y for y, _, _ in points]
    for _ in range(100):
        for lower, upper in pairwise(order):
            if (missing := gap - (places[upper] - places[lower])) > 0:
                places[lower] -= missing / 2
                places[upper] += missing / 2
    for place, (_, text, color) in zip(places, points, strict=True):
        weight = "bold" if color == OURS else "normal"
        axes.text(x, place, text, color=color, weight=weight, ha=align, va="center")
