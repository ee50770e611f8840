"""From what a user calls an adapter, `PATH_OR_REPO`, to its folder."""

from __future__ import annotations

import re
from pathlib import Path

from peft_prefix_ext.checkpoint import CONFIG_NAME, WEIGHTS_NAME, PrefixCheckpointError

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve(source: str | Path) -> Path:
    """Returns the folder of an adapter: `source` itself, or a download of the Hub repository `owner/name[@revision]`.

    Raises:
        PrefixCheckpointError: If it is neither.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    if not _REPO.fullmatch(str(source)):
        raise PrefixCheckpointError(
            f"No prefix adapter at {str(source)!r}: it is neither a folder nor a Hub repository."
        )
    from huggingface_hub import snapshot_download

    repo, _, revision = str(source).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:
        # The Hub's errors are many, of several packages, and each means the same to the user.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PrefixCheckpointError(
            f"No prefix adapter at {str(source)!r}: there is no such folder, and the Hub has no such repository or cannot "
            f"be reached ({reason})."
        ) from error
