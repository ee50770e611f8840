"""The code blocks of README.md and docs/, to be run in a test's folder on a base model of the test's own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CLI = ROOT / "README.md", ROOT / "docs" / "cli.md"
BASE, LOCAL = "HuggingFaceTB/SmolLM2-135M-Instruct", "./base"
SEQ2SEQ, LOCAL_SEQ2SEQ = "google-t5/t5-small", "./t5"
VISION, LOCAL_VISION = "llava-hf/llava-1.5-7b-hf", "./llava"
_BLOCK = re.compile(r"^```(?P<language>[^`\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Args:
        page: The file.
        line: The line of its first code.
        language: What follows the opening fence; in braces for a directive of Sphinx.
        code: What is inside, as written.
    """

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}-{self.language}"

    @property
    def local_code(self) -> str:
        """The code on base models in the folders `base`, `t5` and `llava`."""
        return self.code.replace(BASE, LOCAL).replace(SEQ2SEQ, LOCAL_SEQ2SEQ).replace(VISION, LOCAL_VISION)


def pages() -> list[Path]:
    """Lists README.md and every page of docs/."""
    return [README, *sorted((ROOT / "docs").glob("[!_]*.md")), *sorted((ROOT / "docs").glob("[!_]*/**/*.md"))]


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"])
        for match in _BLOCK.finditer(text)
    ]
    assert text.count("```") == 2 * len(found), f"{page} has a fence that no block starts or ends with"
    return found


def block(language: str, containing: str, page: Path = README) -> str:
    """Returns the one block of this language with `containing` in it, on the base model in the folder `base`."""
    found = [each for each in blocks(page) if each.language == language and containing in each.code]
    assert len(found) == 1, containing
    return found[0].local_code


def commands(code: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell block, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run(code: str, folder: Path) -> str:
    """Runs Python code in a process of its own, and returns what it printed."""
    (folder / "block.py").write_text(code)
    done = subprocess.run([sys.executable, "block.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
