"""Reads a data set from a file, a folder or the Hub, and splits it into examples to train on and to hold out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from peft_prefix_ext.training.columns import FORMATS, Row, RowFormat, examples_of, format_of

TRAIN = "train"
# What people call the part of a data set that is not trained on, the first that there is.
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
# Enough to tell when training should end; more only takes time.
MAX_HELD_OUT = 256
_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".txt": "text"}
_NUM_NAMED = 3
_NOT_THERE = "There is no data set at {!r}: give a file, a folder, or owner/name on the Hub."


@dataclass(frozen=True)
class Source:
    """Rows with the words that name each of them, such as `line 7`.

    Args:
        name: The name of the data set.
        rows: The rows.
        places: Where each row stands.
    """

    name: str
    rows: Sequence[Row]
    places: Sequence[str]


@dataclass(frozen=True)
class Examples:
    """What is trained on.

    Args:
        train: The examples to train on.
        held_out: Others.
        form: The form of the rows.
    """

    train: list[Row]
    held_out: list[Row]
    form: RowFormat

    @property
    def is_chat(self) -> bool:
        """Whether the examples are messages."""
        return isinstance(self.train[0].get("prompt"), list)


def read_examples(
    data: str,
    *,
    eval_data: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    held_out: float = 0.1,
    has_chat_template: bool = True,
    seed: int = 0,
) -> Examples:
    """Reads a data set, and holds out its validation or test rows, or some of all.

    Args:
        data: A file (JSON lines, JSON, Parquet, CSV), a folder of such or of `save_to_disk`, or a data set on the Hub.
        eval_data: Another of these, to hold out.
        subset: The configuration of a data set on the Hub.
        split: The split to train on; `train` by default.
        columns: What the columns are, as `prompt`, `completion` and so on, if they have other names.
        held_out: The share of the rows to hold out, or their number if it is 1 or more. At most `MAX_HELD_OUT`.
        has_chat_template: Whether the tokenizer has a chat template.
        seed: The seed of the split.

    Raises:
        ValueError: If it cannot be read, has other columns, or bad rows; the message names them by line.
    """
    names = dict(columns or {})
    splits = _read(data, subset, split)
    train = splits[TRAIN]
    form = _form(train, names)
    examples = _convert(train, form, names, has_chat_template)
    if eval_data is not None:
        other = _read(eval_data, None, None)
        kept = _convert(other[TRAIN], _form(other[TRAIN], names), names, has_chat_template)[:MAX_HELD_OUT]
    elif HELD_OUT_SPLIT in splits:
        kept = _convert(splits[HELD_OUT_SPLIT], form, names, has_chat_template)[:MAX_HELD_OUT]
    else:
        examples, kept = _split(examples, held_out, data, seed)
    return Examples([each for row in examples for each in row], [each for row in kept for each in row], form)


def read_test_examples(
    data: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    has_chat_template: bool = True,
) -> list[Row]:
    """Reads examples to evaluate on: those of a test or validation split if there is one, else all.

    Args:
        data: A data set, see `read_examples`.
        subset: Its configuration on the Hub.
        split: The split to take.
        columns: What the columns are, if they have other names.
        has_chat_template: Whether the tokenizer has a chat template.

    Raises:
        ValueError: See `read_examples`.
    """
    names = dict(columns or {})
    splits = _read(data, subset, split)
    source = splits[TRAIN] if split is not None else splits.get(HELD_OUT_SPLIT, splits[TRAIN])
    return [each for row in _convert(source, _form(source, names), names, has_chat_template) for each in row]


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Parses `prompt=question` and the like.

    Raises:
        ValueError: If something else is given.
    """
    known = sorted({name for form in FORMATS for name in (*form.columns, *form.optional)})
    names = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column or name not in known:
            raise ValueError(f"--columns takes NAME=COLUMN with NAME one of {', '.join(known)}, got {pair!r}.")
        names[name] = column
    return names


HELD_OUT_SPLIT = "held out"


def _read(data: str, subset: str | None, split: str | None) -> dict[str, Source]:
    """Returns the rows to train on as `TRAIN` and, if the data set has such a split, those to hold out as `HELD_OUT_SPLIT`."""
    path = Path(data)
    if path.is_file():
        return {TRAIN: _read_json(path) if path.suffix in (".json", ".jsonl") else _read_file(path)}
    if not path.is_dir() and (path.is_absolute() or path.suffix in (".json", ".jsonl", *_LOADERS)):
        raise ValueError(_NOT_THERE.format(data))
    splits = _read_splits(data, subset)
    if (split or TRAIN) not in splits:
        only = len(splits) == 1 and split is None
        if not only:
            raise ValueError(f"{data} has no split {split or TRAIN!r}: name one of {', '.join(splits)} with --split.")
        split = next(iter(splits))
    found = {TRAIN: _source(data, splits[split or TRAIN])}
    other = next((name for name in HELD_OUT if name in splits and name != split), None)
    if other is not None:
        found[HELD_OUT_SPLIT] = _source(f"{data}, split {other}", splits[other])
    return found


def _source(name: str, dataset: Dataset) -> Source:
    return Source(name, dataset, [f"row {index}" for index in range(1, len(dataset) + 1)])


def _read_json(path: Path) -> Source:
    """Reads JSON lines, or one list of rows. `datasets` would not name the line that it cannot read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}, is no JSON: {error.msg}.") from error
        places = [f"row {index}" for index in range(1, len(rows) + 1)]
    else:
        rows, places, bad = [], [], []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                    places.append(f"line {number}")
                except json.JSONDecodeError as error:
                    bad.append((f"line {number}", f"no JSON ({error.msg})"))
        _refuse(path, bad)
    _refuse(
        path,
        [
            (place, f"{type(row).__name__}, not an object")
            for row, place in zip(rows, places, strict=True)
            if not isinstance(row, dict)
        ],
    )
    return Source(str(path), rows, places)


def _read_file(path: Path) -> Source:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        known = ", ".join((".jsonl", ".json", *_LOADERS))
        raise ValueError(
            f"{path} is of no kind that can be read: give a file that ends with {known}, a folder or a repository."
        )
    options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
    with _one_sentence(str(path)):
        return _source(str(path), load_dataset(loader, data_files=str(path), split=TRAIN, **options))


def _read_splits(data: str, subset: str | None) -> dict[str, Dataset]:
    with _one_sentence(data):
        if (Path(data) / "dataset_dict.json").is_file() or (Path(data) / "state.json").is_file():
            found = load_from_disk(data)
        else:
            found = load_dataset(data, subset)
        return dict(found) if isinstance(found, DatasetDict) else {TRAIN: found}


class _one_sentence:
    """Turns what `datasets` raises into one sentence."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, DatasetNotFoundError | FileNotFoundError):
            raise ValueError(_NOT_THERE.format(self.name)) from error
        if isinstance(error, Exception):
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"The data set {self.name!r} cannot be read: {reason[0]}") from error


def _form(source: Source, names: Mapping[str, str]) -> RowFormat:
    columns = list(dict.fromkeys(name for row in _first(source.rows) for name in row))
    if not columns:
        raise ValueError(f"{source.name} has no rows.")
    missing = [column for column in names.values() if column not in columns]
    if missing:
        raise ValueError(f"{source.name} has no column {missing[0]!r}, only {', '.join(columns)}.")
    form = format_of(columns, names)
    if form is None:
        forms = "; ".join(" and ".join(each.columns) for each in FORMATS)
        raise ValueError(
            f"{source.name} has the columns {', '.join(columns)}, but training needs one of: {forms}. Say which are which, "
            f"as in --columns prompt={columns[0]} completion={columns[-1]}."
        )
    return form


def _first(rows: Sequence[Row]) -> Iterator[Row]:
    return (rows[index] for index in range(min(len(rows), 100)))


def _convert(source: Source, form: RowFormat, names: Mapping[str, str], has_chat_template: bool) -> list[list[Row]]:
    examples, bad = [], []
    for row, place in zip(source.rows, source.places, strict=True):
        try:
            examples.append(examples_of(row, form, names, has_chat_template=has_chat_template))
        except ValueError as error:
            bad.append((place, str(error)))
    _refuse(source.name, bad)
    return examples


def _refuse(name: str | Path, bad: Sequence[tuple[str, str]]) -> None:
    if bad:
        shown = "; ".join(f"{place}: {reason}" for place, reason in bad[:_NUM_NAMED])
        more = f"; and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
        raise ValueError(
            f"{name} has {len(bad)} bad row{'s' if len(bad) > 1 else ''}: {shown}{more}. Correct or remove them."
        )


def _split(rows: list[list[Row]], held_out: float, name: str, seed: int) -> tuple[list[list[Row]], list[list[Row]]]:
    if not held_out > 0:
        raise ValueError(f"`held_out` must be > 0, got {held_out!r}: training needs rows that say when to stop.")
    number = int(held_out) if held_out >= 1 else max(1, round(held_out * len(rows)))
    number = min(number, MAX_HELD_OUT)
    if number >= len(rows):
        raise ValueError(
            f"{name} has {len(rows)} row{'s' if len(rows) != 1 else ''}, of which {number} cannot be held out: give more rows."
        )
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[number:], shuffled[:number]
