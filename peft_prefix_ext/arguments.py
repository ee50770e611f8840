"""Checks of a config's arguments: each raises `ValueError` with a sentence that names the argument and what it got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_at_least(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}.")


def check_integers(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise ValueError(f"`{name}` must be a list of integers, got {value!r}.")


def check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {value!r}.")
