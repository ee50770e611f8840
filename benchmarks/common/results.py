"""What is done already: a JSON file of records, read at the start and written after each run, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """The records in the file `path`, all made under the same settings.

    Args:
        path: The file; made with the first record.
        settings: What decides the outcome of every run.

    Raises:
        ValueError: If the file's records were made under other settings.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self.path = path
        self.settings = settings
        self.all: list[Record] = []
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != settings:
                raise ValueError(f"{path} holds results of other settings: {content['settings']}, not {settings}.")
            self.all = content["records"]

    def find(self, **wanted: Any) -> list[Record]:
        """Returns the records that have all these fields, in the order in which they were made."""
        return [record for record in self.all if wanted.items() <= record.items()]

    def add(self, record: Record) -> None:
        self.all.append(record)
        partial = self.path.with_suffix(".partial")
        lines = ",\n".join(f"    {json.dumps(record)}" for record in self.all)
        partial.write_text(
            f'{{\n  "settings": {json.dumps(self.settings)},\n  "records": [\n{lines}\n  ]\n}}\n', encoding="utf-8"
        )
        os.replace(partial, self.path)
