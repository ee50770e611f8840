"""The folder in which a server without an engine finds adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def root(tmp_path: Path, options: Any) -> Path:
    """The folder of `--prefix-adapter-dir`."""
    (tmp_path / "root").mkdir()
    options.prefix_adapter_dir = [str(tmp_path / "root")]
    return tmp_path / "root"
