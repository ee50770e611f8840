"""Adapters that a running server finds by their names: with their first request, as their folders come, change and go."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.load.benchmark import expected_answers
from benchmarks.load.traffic import BASE, Traffic, link
from helpers.serving import support
from helpers.serving.server import CONFIG, PREFIXES, complete, serve
from helpers.serving.support import prompt_ids, text_of

PROMPT = prompt_ids(20, seed=60)
# A change is noticed within a second.
NOTICED = 1.5


@pytest.fixture
def root(adapters_folder: Path, client: Any) -> Iterator[Path]:
    yield adapters_folder
    for path in adapters_folder.iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    time.sleep(NOTICED)
    # The server notices with the next request for the name, and other tests share it.
    for name in {model.id for model in client.models.list()} - {"base", *PREFIXES}:
        with pytest.raises(openai.NotFoundError):
            complete(client, name, PROMPT)


@pytest.fixture(scope="module")
def reference(server_folder: Path) -> support.Reference:
    return support.Reference(server_folder / "model")


def write(folder: Path, seed: int, *, tokens: int = 33) -> support.Prefix:
    """Writes an adapter elsewhere, and gives it its name when it is whole."""
    prefix = support.random_prefix(CONFIG, tokens, seed=seed)
    new = folder.with_name(f".{folder.name}")
    support.write_adapter(new, CONFIG, prefix)
    if folder.exists():
        folder.rename(folder.with_name(f".old-{folder.name}"))
    new.rename(folder)
    shutil.rmtree(folder.with_name(f".old-{folder.name}"), ignore_errors=True)
    return prefix


def answer(client: Any, name: str) -> list[str]:
    return complete(client, name, PROMPT).choices[0].text.split()


def test_folders_come_change_and_go(client: Any, root: Path, reference: support.Reference) -> None:
    def expected(prefix: support.Prefix | None) -> list[str]:
        return text_of(reference.greedy(PROMPT, prefix, 6)).split()

    with pytest.raises(openai.NotFoundError, match="`found` does not exist"):
        answer(client, "found")
    time.sleep(NOTICED)
    first = write(root / "found", 201)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: answer(client, "found"), range(16)))
    assert answers == [expected(first)] * 16
    assert [model.root for model in client.models.list() if model.id == "found"] == [str(root / "found")]
    # Another content of another length under the same name, and so no block of the old one.
    second = write(root / "found", 202, tokens=40)
    assert expected(second) != expected(first)
    time.sleep(NOTICED)
    assert answer(client, "found") == expected(second)
    assert answer(client, "base") == expected(None)
    shutil.rmtree(root / "found")
    time.sleep(NOTICED)
    with pytest.raises(openai.NotFoundError, match="`found` does not exist"):
        answer(client, "found")
    assert "found" not in [model.id for model in client.models.list()]
    assert answer(client, "pirate") == expected(PREFIXES["pirate"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_that_changes_before_the_server_looks_again(
    client: Any, root: Path, reference: support.Reference, stream: bool
) -> None:
    """Its 200 tokens are read from the file for each request, so the engine is the first to notice."""
    write(root / "long", 203, tokens=200)
    answer(client, "long")
    new = write(root / "long", 204, tokens=200)
    response = complete(client, "long", PROMPT, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in response) if stream else response.choices[0].text
    assert text.split() == text_of(reference.greedy(PROMPT, new, 6)).split()
    shutil.rmtree(root / "long")
    with pytest.raises(openai.APIError, match="`long` does not exist") as caught:
        for _ in complete(client, "long", PROMPT, stream=stream):
            pass
    if not stream:
        assert isinstance(caught.value, openai.NotFoundError)


def test_a_bad_folder_is_refused_until_it_is_put_right(
    client: Any, root: Path, server_folder: Path, reference: support.Reference
) -> None:
    prefix = support.random_prefix(CONFIG, 7, seed=205)
    prefix[0][0][0, 0, 0] = math.nan
    support.write_adapter(root / "bad", CONFIG, prefix)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="holds NaN or Inf"):
            answer(client, "bad")
    assert (server_folder / "log").read_text().count("Refused: Prefix adapter 'bad'") == 1
    good = write(root / "bad", 206)
    time.sleep(NOTICED)
    assert answer(client, "bad") == text_of(reference.greedy(PROMPT, good, 6)).split()


def test_loaded_as_a_lora(client: Any, tmp_path: Path, reference: support.Reference) -> None:
    prefix = write(tmp_path / "tone", 207)
    client.post("/load_lora_adapter", body={"lora_name": "tone", "lora_path": str(tmp_path / "tone")}, cast_to=str)
    assert answer(client, "tone") == text_of(reference.greedy(PROMPT, prefix, 6)).split()
    client.post("/unload_lora_adapter", body={"lora_name": "tone"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        answer(client, "tone")


@pytest.mark.timeout(1800)
def test_every_answer_is_right_while_folders_come_and_go(client: Any, root: Path, server_folder: Path) -> None:
    names = [f"f{length}" for length in (7, 33, 64, 40)]
    paths = {name: str(root / ".versions" / name) for name in names}
    for name in names:
        length = int(name[1:])
        support.write_adapter(Path(paths[name]), CONFIG, support.random_prefix(CONFIG, length, seed=300 + length))
        link(root, name, paths[name])
    expected = asyncio.run(expected_answers(str(client.base_url), [*names, BASE]))
    assert len({expected[name, question] for name, question in expected}) > len(names)
    traffic = Traffic(str(client.base_url), expected, paths, folder=root)
    outcome = asyncio.run(traffic.run(num_clients=16, seconds=math.inf, max_requests=300))
    assert outcome.wrong == []
    assert outcome.is_right
    assert all(outcome.changes[change] for change in ("replace", "unload", "load")), outcome.changes


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
