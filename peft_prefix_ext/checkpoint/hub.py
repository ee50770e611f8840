"""Resolves a `PATH_OR_REPO` to the folder of an adapter."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, PrefixNotFoundError

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?")


def resolve(source: str | Path) -> Path:
    """Returns the folder of an adapter: `source` itself, or a download of the Hub repository `owner/name[/folder][@revision]`.

    Raises:
        PrefixNotFoundError: If there is neither.
    """
    try:
        folder = Path(source).expanduser()
        if folder.exists():
            return folder
    except (OSError, RuntimeError) as error:
        # An unknown user's home, a name that is too long, a folder without permission.
        raise PrefixNotFoundError(f"No prefix adapter at {str(source)!r} ({error}).") from error
    if _REPO.fullmatch(str(source)) is None:
        raise PrefixNotFoundError(f"No prefix adapter at {str(source)!r}: it is neither a folder nor a Hub repository.")
    try:
        return download(str(source))
    except Exception as error:
        raise PrefixNotFoundError(
            f"No prefix adapter at {str(source)!r}: there is no such folder, and the Hub has no such repository or "
            f"revision, or cannot be reached ({reason_of(error)})."
        ) from error


def reason_of(error: Exception) -> str:
    """Returns the reason in an error of another package, in one line: the name of its type says more than some messages."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def download(repository: str) -> Path:
    """Returns the folder of an adapter in a snapshot of the Hub repository `owner/name[/folder][@revision]`.

    Raises:
        Exception: Any error of the client of the Hub.
    """
    from huggingface_hub import snapshot_download

    place = _REPO.fullmatch(repository)
    assert place is not None
    # PEFT saves an adapter that is not called "default" in a subfolder.
    subfolder = place["folder"].lstrip("/")
    files = [str(PurePosixPath(subfolder, name)) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    return Path(snapshot_download(place["repo"], revision=place["revision"], allow_patterns=files)) / subfolder
