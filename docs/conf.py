"""Sphinx: Markdown by MyST, API pages from docstrings."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

project = "peft-prefix-ext"
author = copyright = "the peft-prefix-ext authors"
release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings have names in single backticks
myst_heading_anchors = 3

napoleon_numpy_docstring = False
autodoc_typehints_description_target = "documented"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"{project} {release}"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_in_peft)


def _as_in_peft(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Reads docstrings as PEFT writes them: [`Name`] for a link, `Name`s for several, examples in fences."""
    for number, line in enumerate(lines):
        plain = "" if line.strip().startswith("```") else re.sub(r"\[`~?([^`]+)`\]", r"`\1`", line)
        lines[number] = re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", plain)
