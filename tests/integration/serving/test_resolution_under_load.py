"""Many clients while adapters appear, change and vanish in the folder of a server: every answer is that of the right adapter.

Links are turned, and files are overwritten in place. The short form of `python -m benchmarks.load --folder`.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.load.__main__ import parse_args
from benchmarks.load.benchmark import check_answers, expected_answers, run
from benchmarks.load.folder_changes import link
from benchmarks.load.name_history import BASE
from benchmarks.load.traffic import Traffic
from helpers.serving import support
from helpers.serving.found import NOTICED, PROMPT, answer, write
from helpers.serving.server import CONFIG, serve
from helpers.serving.support import text_of


@pytest.mark.timeout(1800)
def test_every_answer_is_right_while_folders_come_change_and_go(client: Any, root: Path, server_folder: Path) -> None:
    names = [f"f{length}" for length in (7, 33, 64, 40, 32)]
    paths = {name: str(root / ".versions" / name) for name in names}
    prefixes = {name: support.random_prefix(CONFIG, int(name[1:]), seed=300 + int(name[1:])) for name in names}
    for name in names:
        support.write_adapter(Path(paths[name]), CONFIG, prefixes[name])
        link(root, name, paths[name])
    expected = asyncio.run(expected_answers(str(client.base_url), [*names, BASE]))
    assert check_answers(expected, prefixes, server_folder / "model") == []
    traffic = Traffic(str(client.base_url), expected, paths, folder=root)
    outcome = asyncio.run(traffic.run(num_clients=16, seconds=math.inf, max_requests=300))
    assert outcome.wrong == []
    assert outcome.is_right
    assert all(outcome.changes[change] for change in ("replace", "unload", "load", "overwrite")), outcome.changes


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_api_servers_and_two_engines_under_load() -> None:
    """Base requests among them; no status is 5xx, and the memory of no process grows."""
    options = ["--api-server-count=2", "--data-parallel-size=2"]
    report = run(
        parse_args(["--folder", "--seconds", "240", "--clients", "32", *(f"--option={option}" for option in options)])
    )
    assert report["ok"], report
    assert all(report["changes of adapters"][change] for change in ("replace", "unload", "load", "overwrite")), report
    # The front end, two API servers, two engines and their workers.
    assert len(report["memory"]) >= 5


@pytest.mark.soak
@pytest.mark.parametrize("options", [("--api-server-count", "2"), ("--data-parallel-size", "2")], ids=" ".join)
def test_processes_agree(
    server_folder: Path, tmp_path: Path, reference: support.Reference, options: tuple[str, str]
) -> None:
    (tmp_path / "root").mkdir()
    folder = tmp_path / "root" / "found"
    with serve(server_folder, *options, "--prefix-adapter-dir", str(folder.parent)) as client:
        for seed in (208, 209):
            prefix = write(folder, seed, tokens=33 + seed % 2)
            time.sleep(NOTICED)
            expected = text_of(reference.greedy(PROMPT, prefix, 6)).split()

            def ask(_: int, expected: list[str] = expected) -> bool:
                with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as mine:
                    return answer(mine, "found") == expected

            with ThreadPoolExecutor(16) as pool:
                assert all(pool.map(ask, range(32)))
        shutil.rmtree(folder)
        time.sleep(NOTICED)
        for _ in range(8):
            with (
                openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as mine,
                pytest.raises(openai.NotFoundError),
            ):
                answer(mine, "found")
