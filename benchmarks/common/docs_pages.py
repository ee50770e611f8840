"""The parts of the main README that benchmarks write: what lies between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def put(readme: Path, name: str, text: str) -> None:
    """Writes `text` between the markers of the benchmark `name`.

    Raises:
        ValueError: If the file has no such markers.
    """
    begin, end = markers(name)
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme} must have the lines {begin!r} and {end!r}.")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    """Returns the lines before and after the part of the benchmark `name`."""
    return f"<!-- {name}: made by benchmarks/{name}.py --report -->", f"<!-- /{name} -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
