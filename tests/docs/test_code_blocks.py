"""Every code block of the README and of docs/ does what its page says: each page in a folder of its own, on a tiny model.

Python blocks of a page share their names, as a reader would go on typing; commands run in the page's folder; one server, the
README's, answers all clients. A block in a language without a rule fails, and so does a command that is neither run nor listed in
`NOT_RUN`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.code_block_rules import NOT_RUN, RULES, Page, serve_parser
from helpers.code_blocks import README, ROOT, Block, block, blocks, commands, pages
from helpers.tiny import tiny_model
from helpers.tiny_processor import save_vision_model
from helpers.tiny_seq2seq import tiny_encoder_decoder

TRAINS, SERVES = "prefix-ext train rows", "vllm serve"  # what the README's own two blocks have in them
ROWS = [
    {"prompt": f"name: Aromi {index}, food: Italian =>", "completion": " Aromi serves Italian food."}
    for index in range(40)
]
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
# The README's clients come last: their server starts meanwhile.
BLOCKS = [each for page in sorted(pages(), key=lambda page: page == README) for each in blocks(page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, subword_tokenizer: Any) -> Path:
    """Tiny base models, rows, and what the README's first command leaves behind: each page goes on from there."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = copy.deepcopy(subword_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, model in {
        "base": tiny_model("llama", vocab_size=300, head_dim=32),
        "t5": tiny_encoder_decoder("t5", vocab_size=300),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_vision_model(folder / "llava")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    for words in commands(block("bash", TRAINS)):
        subprocess.run(
            [sys.executable, "-m", "peft_prefix_ext", *words[1:], "--use_cpu"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Callable[[], int]]:
    """Starts the README's server, and yields what waits for it and returns its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = _serve(folder, port)

    @functools.cache
    def ready() -> int:
        _wait(process, port, folder / "server.log")
        return port

    yield ready
    ready()  # a server that still starts loses the signal
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def page_of(folder: Path, server: Callable[[], int]) -> Callable[[Path], Page]:
    @functools.cache
    def page_of(path: Path) -> Page:
        if path == README:
            return Page(folder, server)
        own = folder / "-".join(path.relative_to(ROOT / "docs").with_suffix("").parts)
        own.mkdir()
        for name in ("base", "t5", "llava", "rows.jsonl"):
            (own / name).symlink_to(folder / name)
        shutil.copytree(folder / "restaurant", own / "restaurant")
        return Page(own, server)

    return page_of


@pytest.mark.parametrize("each", BLOCKS, ids=str)
def test_block(each: Block, page_of: Callable[[Path], Page], monkeypatch: pytest.MonkeyPatch) -> None:
    if each.language not in RULES:
        pytest.fail(f"{each}: no rule for blocks of the language {each.language!r}")
    page = page_of(each.page)
    monkeypatch.chdir(page.folder)
    if each.page == README and each.language == "bash" and TRAINS in each.code:
        names = {path.name for path in (page.folder / "restaurant").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
        return
    RULES[each.language](each, page)


def test_what_does_not_run_is_on_a_page() -> None:
    found = [words for each in BLOCKS if each.language == "bash" for words in commands(each.code)]
    for begin in NOT_RUN:
        assert any(tuple(words[: len(begin)]) == begin for words in found), begin


def test_metrics_are_called_what_the_pages_say(page_of: Callable[[Path], Page]) -> None:
    page = page_of(README)
    text = page.get("/metrics")
    told = {name for path in pages() for name in re.findall(r"vllm:prefix_adapter\w+", path.read_text())}
    assert told == set(re.findall(r"^# TYPE (vllm:prefix_adapter\w+(?<!_created)) ", text, re.MULTILINE))


def test_options_of_the_plugin_are_those_on_the_page() -> None:
    """Names and defaults; what there is for `prefix-ext` is tested with the pages."""
    (parser,) = serve_parser()._subparsers._group_actions[0].choices.values()
    (group,) = (group for group in parser._action_groups if group.title == "Prefix adapters")
    there = {option for action in group._group_actions for option in action.option_strings}
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").partition("## vllm serve")[2]
    assert there == set(re.findall(r"^\| `(--[\w-]+)`", page, re.MULTILINE))


def _serve(folder: Path, port: int) -> subprocess.Popen[Any]:
    program, command, *words = shlex.split(block("bash", SERVES))
    assert (program, command) == ("vllm", "serve")
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--port", str(port)]
    log = (folder / "server.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_plugin", *words, *options],
        cwd=folder,
        stdout=log,
        stderr=log,
        env={**os.environ, "PREFIX_SERVE_ALLOW_RUNTIME_UPDATING": "1"},
    )


def _wait(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    process.kill()
    pytest.fail(log.read_text()[-3000:])
