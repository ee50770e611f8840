"""A page of Python's manual, which `pydoc_data.topics` holds: `help("naming")` shows the same."""

from __future__ import annotations

from pydoc_data.topics import topics

# About scopes, in prose: 1,483 tokens of SmolLM2 in Python 3.11.
TOPIC = "naming"


def manual_page(topic: str = TOPIC) -> str:
    """Returns the text of a page.

    Raises:
        ValueError: If there is no such page.
    """
    if topic not in topics:
        raise ValueError(f"There is no page {topic!r} in `pydoc_data.topics`: name one of its topics.")
    return str(topics[topic]).strip()
