"""Local folders under names that mean the same in every working directory."""

from __future__ import annotations

import os


def absolute_if_local(name_or_path: str | None) -> str | None:
    """Returns the absolute path of a folder that is there, and anything else, such as a name on the Hub, as it is.

    As in transformers, a folder comes before a repository of the same name.
    """
    return os.path.abspath(name_or_path) if name_or_path and os.path.isdir(name_or_path) else name_or_path
