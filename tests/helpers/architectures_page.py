"""The documentation's table of what trains and what is served, made from the lists that tests run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.architectures import ARCHITECTURES, MULTIMODAL, REFUSED, STATES
from helpers.serving import served

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures: generated from the lists of the tests -->\n", "<!-- end -->\n"
HEADER = ["layers", "model types", "trains", "serves", "media", "states"]
NONE = "-"
IMAGES_OR_AUDIO = "Images or audio beside text"


def table() -> str:
    """Returns the table: model types of the same kind and with the same columns share a row."""
    rows = ["| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|"]
    for kind, names in _kinds():
        by_columns: dict[tuple[str, ...], list[str]] = {}
        for name, columns in names:
            by_columns.setdefault(columns, []).append(name)
        for columns, alike in by_columns.items():
            rows.append(f"| {kind} | {', '.join(alike)} | {' | '.join(columns)} |")
    return "\n".join(rows) + "\n"


def _kinds() -> Iterator[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    """Yields each kind of model with its types, and what the columns after these say of them."""
    states_of = {}
    for kind, models in ARCHITECTURES.items():
        types = list(dict.fromkeys(name.partition(":")[0] for name in models))
        states = STATES.get(kind, NONE)
        states_of.update(dict.fromkeys(types, states))
        yield kind, [(name, ("yes", _serves(name, models), NONE, states)) for name in types]
    yield (
        IMAGES_OR_AUDIO,
        [
            (name, ("yes", _serves_beside_media(name), media, states_of.get(name, NONE)))
            for name, media in MULTIMODAL.items()
        ],
    )
    yield "Others", [(name, ("no", NONE, NONE, NONE)) for name in REFUSED]


def _serves(model_type: str, models: Iterable[str]) -> str:
    """Returns whether the variants of a model type that the sweep has are served."""
    variants = {name for name in models if name.partition(":")[0] == model_type}
    exact = variants & {*served.EXACT, *served.SOAK, *served.HYBRIDS}
    refused = variants & served.REFUSED.keys()
    if exact:
        return f"{', '.join(sorted(exact))} only" if refused else "yes"
    return "no" if refused else NONE


def _serves_beside_media(model_type: str) -> str:
    if model_type in served.MULTIMODAL_IMAGES:
        return "with images"
    return "text alone" if model_type in served.MULTIMODAL_TEXT else NONE


def rewritten(page: str) -> str:
    """Returns the page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def rewrite() -> None:
    """Writes the page."""
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
