"""The checkpoints of `Trainer` after a run that was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint


def last_whole_checkpoint(folder: Path) -> str | None:
    """Returns the last checkpoint of `Trainer`, without those that a killed run did not finish, which it removes."""
    while folder.exists() and (last := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(last) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # which is written last
        except (OSError, ValueError):
            shutil.rmtree(last)
        else:
            return last
    return None
