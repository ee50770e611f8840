"""The tables and the plot of distilled documents."""

from __future__ import annotations

from math import nan
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.common import plots
from benchmarks.common.results import Record
from benchmarks.common.tables import markdown_table
from benchmarks.distillation.exam import CHOICE, LOGPROB, SCORE
from benchmarks.distillation.shares import DocumentResults, spread
from benchmarks.distillation.tasks.documents import DISTILLED, DOCUMENTS, NEXT_TOKEN

MEASURES = {
    CHOICE: "right choices",
    LOGPROB: "log-probability of the right answer, nats per token",
    SCORE: "word F1 of free answers",
}
SHORT = {CHOICE: "Right choices", LOGPROB: "Right answer's log-prob.", SCORE: "Free answers' F1"}
COLORS = {DISTILLED: plots.OURS, NEXT_TOKEN: plots.DARK}
OTHERS = ("truncation", "sampled chunks", "a summary")


def document_tables(content: Record) -> str:
    """Returns a table for each document and measure, with a column for each length."""
    parts = [part for name in DOCUMENTS if (part := _tables(content, name))]
    settings = content["settings"]
    title = (
        "### Documents\n\n"
        f"Prefixes of each length and other openings of at most as many tokens: {settings['num_exam']} questions that nothing "
        f"was trained on, {settings['document_steps']} steps. Cells are recovered shares, or the values themselves where "
        "nothing and the full context do not separate."
    )
    return "\n\n".join([title, *parts]) if parts else ""


def save_plot(content: Record, path: Path) -> bool:
    """Plots the recovered share by the length of the prefix: of the first document, an axes for each measure that separates.

    Returns:
        Whether there is something to plot.
    """
    for name in DOCUMENTS:
        found = DocumentResults(content, name)
        if found.records and (clear := list(filter(found.is_clear, MEASURES))):
            break
    else:
        return False
    title = f"{name.capitalize()}: recovered share by the length of the prefix"
    subtitle = f"{content['settings']['model']}; 0 is nothing, 1 the full context. Grey: {', '.join(OTHERS)}"
    with plots.plot(path, title, subtitle, height=4, columns=len(clear), share_y=True) as columns:
        for axes, measure in zip(columns, clear, strict=True):
            _draw(axes, found, measure)
            axes.set_title(SHORT[measure])
    return True


def _draw(axes: Axes, found: DocumentResults, measure: str) -> None:
    lengths = found.lengths
    ends = []
    for name in found.rows:
        shares = [found.shares(name, length, measure) for length in lengths]
        color = COLORS.get(name, plots.GREY)
        # Of an opening, nothing may fit a short length.
        means = [fmean(values) if values else nan for values in shares]
        plots.line(axes, means, color)
        if shares[-1] and name in COLORS:
            ends.append((means[-1], name.removesuffix(" training"), color))
    places = range(len(lengths))
    plots.label_points(axes, places[-1] + 0.2, ends, 0.12, "left")
    for share in (0, 1):
        axes.axhline(share, color=plots.LIGHT, linewidth=1.5, zorder=0)
    axes.set_xticks(places, [str(length) for length in lengths])
    axes.set(xlim=(-0.2, places[-1] + 0.4 + 0.5 * len(lengths)), xlabel="tokens")


def _tables(content: Record, name: str) -> str:
    found = DocumentResults(content, name)
    if not found.records:
        return ""
    parts = []
    for measure, title in MEASURES.items():
        if found.has(measure):
            parts.append(_table(found, name, measure, title))
    return "\n\n".join(parts)


def _table(found: DocumentResults, name: str, measure: str, title: str) -> str:
    is_clear = found.is_clear(measure)
    nothing, full = (spread(found.reference(row, measure), 2) for row in ("nothing", "full context"))
    tokens = spread(found.reference("full context", "tokens"), 0)
    what = (
        _verdict(found, measure)
        if is_clear
        else "No verdict: the full context is not better than nothing beyond chance."
    )
    cells = found.shares if is_clear else found.values
    rows = [[row, *(spread(cells(row, length, measure), 2) for length in found.lengths)] for row in found.rows]
    return "\n\n".join(
        [
            f"**{name.capitalize()} of {tokens} tokens, {title}**: nothing {nothing}, full context {full}. {what}",
            markdown_table(["", *(f"{length} tokens" for length in found.lengths)], rows),
        ]
    )


def _verdict(found: DocumentResults, measure: str) -> str:
    ahead = [str(length) for length in found.lengths if found.is_ahead(DISTILLED, length, measure)]
    where = f"at {', '.join(ahead)} tokens" if ahead else "at no length"
    margin = "by more than the seeds differ " if len(found.references) > 1 else ""
    return f"Recovered shares; distilled is ahead of all others {margin}{where}{'' if margin else ', with one seed'}."
