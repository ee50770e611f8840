"""The list of slow tests follows renames."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.slow import SLOW


def test_every_slow_test_exists() -> None:
    """A failure here after a rename: change tests/helpers/slow.py, or `make test-fast` runs the test."""
    for file, tests in SLOW.items():
        defined = re.findall(
            r"^ *def (test_\w+)", (Path(__file__).parent / file).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert [test for test in tests if test not in defined] == [], file
