"""What an adapter records of the context that it stands for, and which of its sources have changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def text_hash(text: str) -> str:
    """Returns the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def changed_sources(context: Mapping[str, Any]) -> list[str]:
    """Returns the names of the sources that are files with another text now.

    A source without such a file, here or anywhere, says nothing.

    Args:
        context: The `context` of an adapter's config.
    """
    sources = context.get("sources")
    hashes = sources.items() if isinstance(sources, dict) else []
    return [name for name, recorded in hashes if (now := _file_hash(name)) is not None and now != recorded]


def _file_hash(name: str) -> str | None:
    try:
        # What is no UTF-8 was no source.
        return text_hash(Path(name).read_text(encoding="utf-8", errors="replace")) if Path(name).is_file() else None
    except (OSError, ValueError):  # it cannot be read, or no file can have this name
        return None
