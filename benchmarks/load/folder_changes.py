"""Changes in a server's folder of adapters: at once, by links, or in place."""

from __future__ import annotations

import shutil
import time
from pathlib import Path


def link(folder: Path, name: str, path: str | None) -> None:
    """Makes a name in a folder a link to an adapter, in one step; None removes it."""
    if path is None:
        (folder / name).unlink()
        return
    new = folder / f".new-{name}"
    new.symlink_to(path)
    new.replace(folder / name)


def copy(folder: Path, name: str) -> None:
    """Puts a copy in the place of the link to an adapter."""
    target = (folder / name).resolve()
    link(folder, name, None)
    shutil.copytree(target, folder / name)


def overwrite(folder: Path, path: str) -> None:
    """Overwrites the files of an adapter in place with those of another one, in pieces.

    In between they are half of each, and may look whole.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (Path(path) / name).read_bytes()
        with (folder / name).open("r+b", buffering=0) as file:
            for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(part)
                time.sleep(0.005)
            file.truncate()
