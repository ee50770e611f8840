"""A results file: JSON records that are read at the start and written after each run, so that a benchmark can resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Record = dict[str, Any]


class ResultsFile:
    """The records in the file `path`, all made under the same settings.

    Args:
        path: The file; created with the first record.
        settings: The settings that affect the outcome of every run.

    Raises:
        ValueError: If the records in the file were made under other settings.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self.path = path
        self.settings = settings
        self.records: list[Record] = []
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != settings:
                raise ValueError(f"{path} holds results of other settings: {content['settings']}, not {settings}.")
            self.records = content["records"]

    def find(self, **fields: Any) -> list[Record]:
        """Returns the records that have all these fields, oldest first."""
        return [record for record in self.records if fields.items() <= record.items()]

    def add(self, record: Record) -> None:
        """Appends a record and replaces the file atomically."""
        self.records.append(record)
        partial = self.path.with_suffix(".partial")
        lines = ",\n".join(f"    {json.dumps(record)}" for record in self.records)
        partial.write_text(
            f'{{\n  "settings": {json.dumps(self.settings)},\n  "records": [\n{lines}\n  ]\n}}\n', encoding="utf-8"
        )
        os.replace(partial, self.path)
