"""A report as Markdown, with a plot, and its table in the model card of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from peft_prefix_ext.distillation.reporting.report import Report, Row, spread
from peft_prefix_ext.tuner.model_card import add_section

REPORT_NAME, PAGE_NAME, PLOT_NAME = "report.json", "report.md", "report.png"
_START, _END = "<!-- peft-prefix-ext report -->", "<!-- /peft-prefix-ext report -->"


def write_report(report: Report, folder: str | Path) -> Path:
    """Writes `report.json`, `report.md` and, if matplotlib is installed, `report.png`.

    Returns:
        The path of `report.md`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
    has_plot = plot(report, folder / PLOT_NAME)
    last = f"![Scores]({PLOT_NAME})" if has_plot else "There is no plot, since matplotlib is not installed."
    page = folder / PAGE_NAME
    page.write_text(f"{to_markdown(report)}\n{last}\n", encoding="utf-8")
    return page


def add_to_card(folder: str | Path, report: Report) -> None:
    """Puts the table and the verdict into the model card of an adapter, behind its own section there, in place of an earlier report.

    They stay there when the adapter is saved into this folder again.

    Args:
        folder: The folder of the adapter.
        report: The report on it.
    """
    lines = ["## What it keeps of its context", "", _table(report), "", *_verdict(report)]
    add_section(folder, "\n".join(lines), _START, _END)


def to_markdown(report: Report) -> str:
    """Returns the report as a page: scores first, then drift, costs, the verdict, sources and settings."""
    drift = [
        [name, spread([each.logprob_difference for each in seeds]), spread([each.same_token for each in seeds])]
        for name, seeds in report.drift.items()
    ]
    costs = [
        [
            cost.name,
            f"{cost.num_tokens:,}",
            f"{cost.num_bytes:,}",
            f"{1000 * cost.first_token_seconds:,.1f}",
            f"{cost.tokens_per_second:,.1f}",
        ]
        for cost in report.costs
    ]
    full, last = report.rows[1], report.rows[-1]
    own = report.num_own_references
    parts = [
        f"# {last.num_tokens:,} tokens in place of {full.num_tokens:,}",
        _table(report),
        f"{len(report.questions)} held-out questions"
        + (f"; to {own} of them the full context's own answer counts as right. " if own else ". ")
        + f"The other openings may be as many tokens longer than nothing as the prefix has, {last.num_tokens:,}.",
        "## Off topic",
        _markdown(["", "difference of log-probability, nats per token", "same most probable token"], drift),
        "## Costs",
        _markdown(["", "tokens", "bytes", "ms to the first token", "tokens per second"], costs),
        *([paid] if (paid := _paid(report)) else []),
        "## Verdict",
        "\n".join(_verdict(report)),
        "## Made from",
        _markdown(["source", "SHA-256"], [[name, f"`{value}`"] for name, value in report.sources.items()]),
        _markdown(["setting", ""], [[name, str(value)] for name, value in report.settings.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def plot(report: Report, path: str | Path) -> bool:
    """Draws the scores of all rows, with the spread over seeds, between those of nothing and of the full context.

    Returns:
        Whether there is a plot: there is none without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 1 + 0.4 * len(report.rows)), layout="constrained")
    measures = ((report.metric, "scores"), ("log-probability per token", "logprobs"))
    for axes, (title, field) in zip(figure.subplots(1, 2, sharey=True), measures, strict=True):
        for place, row in enumerate(report.rows):
            values: list[float] = getattr(row, field)
            mean = fmean(values)
            error = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(mean, place, xerr=error, fmt="o", color="tab:blue" if row.is_prefix else "gray", capsize=3)
        for row in report.rows[:2]:  # nothing and the full context
            axes.axvline(getattr(row, field)[0], color="lightgray", linestyle="--", zorder=0)
        axes.set_yticks(range(len(report.rows)), [row.name for row in report.rows])
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    return True


def _table(report: Report) -> str:
    def share(row: Row, shares: list[float] | None) -> str:
        return spread(shares) if shares and row is not report.rows[0] else ""

    rows = [
        [
            f"**{row.name}**" if row.is_prefix else row.name,
            f"{row.num_tokens:,}",
            spread(row.scores),
            share(row, report.recovered_shares(row)),
            spread(row.logprobs),
            share(row, report.recovered_logprob_shares(row)),
        ]
        for row in report.rows
    ]
    return _markdown(["", "tokens", report.metric, "recovered", "log-probability", "recovered"], rows)


def _verdict(report: Report) -> list[str]:
    return [f"- {sentence}" for sentence in report.verdict()]


def _paid(report: Report) -> str | None:
    if report.seconds_spent is None:
        return None
    took = f"It took {report.seconds_spent:,.0f} seconds to make"
    if report.requests_until_paid is None:
        return f"{took}, which no request wins back: the first token does not come earlier than behind the text."
    return f"{took}, which {report.requests_until_paid:,.0f} requests win back, against text that no cache holds."


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
