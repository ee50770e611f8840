"""Many clients of the server at once while adapters change: the short form of `python -m benchmarks.load`."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.benchmark import check_answers, expected_answers
from benchmarks.load.name_history import BASE
from benchmarks.load.traffic import Traffic
from helpers.serving import support
from helpers.serving.server import CONFIG, PREFIXES, load, unload


@pytest.mark.timeout(1800)
def test_every_answer_is_right_while_adapters_come_and_go(client: Any, server_folder: Path) -> None:
    prefixes = {**PREFIXES, **{f"p{length}": support.random_prefix(CONFIG, length, seed=length) for length in (33, 64)}}
    paths = {name: str(server_folder / name) for name in prefixes}
    added = prefixes.keys() - PREFIXES.keys()
    for name in added:
        support.write_adapter(Path(paths[name]), CONFIG, prefixes[name])
        load(client, name, Path(paths[name]))
    base_url = str(client.base_url)
    expected = asyncio.run(expected_answers(base_url, [*prefixes, BASE]))
    assert check_answers(expected, prefixes, server_folder / "model") == []
    # So many, on a slow machine as on a fast one.
    traffic = Traffic(base_url, expected, paths)
    outcome = asyncio.run(traffic.run(num_clients=16, seconds=math.inf, max_requests=300))
    for name in added:
        unload(client, name)
    assert outcome.wrong == []
    assert outcome.is_right
    assert sum(outcome.answers.values()) == 300
    assert all(outcome.answers[how] for how in ("whole", "streamed", "begun", "hung up")), outcome.answers
    assert all(outcome.changes[change] for change in ("replace", "unload", "load")), outcome.changes
