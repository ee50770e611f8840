"""Odd names in requests, and odd things in the folder of adapters: a running server refuses them, and serves the others."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import support
from helpers.serving.found import PROMPT, answer, write
from helpers.serving.server import PREFIXES
from helpers.serving.support import text_of

WEIGHTS = "adapter_model.safetensors"


def odd_names(root: Path) -> list[str]:
    outside = root.parent / "secret"
    return [
        *(
            "../secret",
            "../../secret",
            f"{root.name}/../secret",
            "./good",
            "good/",
            "good/.",
            "../adapters/good",
            "GOOD",
        ),
        *(
            str(outside),
            f"/{outside}",
            f"file://{outside}",
            f"memory://{outside}",
            "~",
            "..",
            ".",
            "/",
            "-",
            " ",
            "good ",
        ),
        *(
            "good\0",
            "good\n",
            "good%00",
            "%2e%2e/secret",
            "..%2fsecret",
            "..\\secret",
            "gööd",
            "\u202egood",
            "a" * 100_000,
        ),
        *(
            ".good",
            ".versions",
            "*",
            "g*",
            "good;ls",
            "$(id)",
            "{}",
            "None",
            "null",
            "\ud800".encode("utf-8", "replace").decode(),
        ),
    ]


def refused(client: Any, name: str) -> str:
    """Asks for a name that nothing right has, and returns what the server says."""
    with pytest.raises(openai.APIStatusError) as caught:
        answer(client, name)
    assert caught.value.status_code in (400, 404), (name, caught.value)
    return str(caught.value)


def test_names_are_never_paths(client: Any, root: Path, reference: support.Reference) -> None:
    secret, good = write(root.parent / "secret", 401), write(root / "good", 402)
    expected = [text_of(reference.greedy(PROMPT, prefix, 6)).split() for prefix in (secret, good)]
    assert expected[0] != expected[1]
    for name in odd_names(root):
        refused(client, name)
    assert answer(client, "good") == expected[1]
    assert {model.id for model in client.models.list()} == {"base", *PREFIXES, "good"}


def test_what_is_no_adapter(client: Any, root: Path, reference: support.Reference) -> None:
    outside, good = root.parent / "secret", write(root / "good", 403)
    write(outside, 404)
    odd = ["link", "file-link", "fifo", "zero", "endless", "half", "empty", "loop", "up", "file"]
    for name in odd[1:6]:
        write(root / name, 405)
    (root / "link").symlink_to(outside)
    for name, file in (("file-link", WEIGHTS), ("fifo", "adapter_config.json"), ("zero", WEIGHTS)):
        (root / name / file).unlink()
    (root / "file-link" / WEIGHTS).symlink_to(outside / WEIGHTS)
    os.mkfifo(root / "fifo" / "adapter_config.json")
    (root / "zero" / WEIGHTS).symlink_to("/dev/zero")
    os.truncate(root / "endless" / WEIGHTS, 1 << 40)
    os.truncate(root / "half" / WEIGHTS, (root / "half" / WEIGHTS).stat().st_size // 2)
    (root / "empty").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to("..")
    (root / "file").write_bytes(b"")
    for _ in range(2):
        for name in odd:
            message = refused(client, name)
            assert ("links to a place outside" in message) == (name in ("link", "file-link", "zero", "up")), message
    # One that someone writes without end holds up nobody else.
    growing, done = root / "growing", threading.Event()
    write(growing, 406)

    def append() -> None:
        with (growing / WEIGHTS).open("ab", buffering=0) as file:
            while not done.wait(0.01):
                file.write(b"more")

    writer = threading.Thread(target=append)
    writer.start()
    try:
        assert "are being written" in refused(client, "growing")
        assert answer(client, "good") == text_of(reference.greedy(PROMPT, good, 6)).split()
    finally:
        done.set()
        writer.join()
    listed = {model.id for model in client.models.list()}
    assert listed >= {"base", *PREFIXES, "good"}
    assert listed.isdisjoint({"link", "file-link", "fifo", "zero", "empty", "loop", "up", "file"})
