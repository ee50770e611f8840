"""Adapters that a running server finds by their names: with their first request, as their folders come, change and go."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import support
from helpers.serving.found import NOTICED, PROMPT, answer, write
from helpers.serving.server import CONFIG, PREFIXES, complete
from helpers.serving.support import text_of


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
    # At once, and before there is a request for it.
    assert "found" not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError, match="`found` does not exist"):
        answer(client, "found")
    assert answer(client, "pirate") == expected(PREFIXES["pirate"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_that_changes_before_the_server_looks_again(
    client: Any, root: Path, reference: support.Reference, stream: bool
) -> None:
    """Its 200 tokens are read from the file for each request, so the engine is the first to notice."""
    # A name that was refused just now is not looked for again for a second.
    name = f"long-{stream}"
    write(root / name, 203, tokens=200)
    answer(client, name)
    new = write(root / name, 204, tokens=200)
    response = complete(client, name, PROMPT, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in response) if stream else response.choices[0].text
    assert text.split() == text_of(reference.greedy(PROMPT, new, 6)).split()
    shutil.rmtree(root / name)
    with pytest.raises(openai.APIError, match=f"`{name}` does not exist") as caught:
        for _ in complete(client, name, PROMPT, stream=stream):
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
