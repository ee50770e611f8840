"""Names of local folders that are valid in every working directory."""

from __future__ import annotations

import os


def absolute_if_local(name_or_path: str | None) -> str | None:
    """Returns the absolute path of an existing folder, and any other name, such as one on the Hub, as it is.

    As in transformers, a folder takes precedence over a repository of the same name.
    """
    return os.path.abspath(name_or_path) if name_or_path and os.path.isdir(name_or_path) else name_or_path
