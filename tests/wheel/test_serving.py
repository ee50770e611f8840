"""The wheel serves what it trained, beside vLLM: `prefix-serve` and the plugin's entry point are those of the wheel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.distributions import ROOT, archive, call, install

ADAPTER = "restaurant"
PROMPT = "name: Aromi, food: Italian =>"
TOKENS = 16
START_SECONDS = 300.0
GENERATE = f"""
import json, peft_prefix_ext, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained("base")({PROMPT!r}, return_tensors="pt").input_ids
base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
options = dict(max_new_tokens={TOKENS}, min_new_tokens={TOKENS}, do_sample=False)
plain = base.generate(ids, **options)[0, ids.shape[1]:].tolist()
prefixed = PeftModel.from_pretrained(base, {ADAPTER!r}).eval().generate(input_ids=ids, **options)[0, ids.shape[1]:].tolist()
print(json.dumps([plain, prefixed]))
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel, and vLLM from the clone's."""
    return install(archive(".whl"), tmp_path_factory.mktemp("serve") / "environment", ROOT / ".venv")


@pytest.fixture(scope="module")
def server(commands: Path, folder: Path) -> Iterator[str]:
    """The address of a server of the adapter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1", "--port", port]
    environment = {
        **os.environ,
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [commands / "prefix-serve", "base", "--prefix-adapter", f"{ADAPTER}={ADAPTER}", *options]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait(server, f"http://127.0.0.1:{port}", folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health"):
                return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"The server did not start:\n{log.read_text()[-3000:]}")


def complete(address: str, model: str) -> Any:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def test_both_packages_are_the_wheels(commands: Path, folder: Path) -> None:
    program = (
        "import sys, peft_prefix_ext, vllm_plugin\n"
        "from importlib.metadata import entry_points\n"
        "files = [peft_prefix_ext.__file__, vllm_plugin.__file__]\n"
        "assert all(file.startswith(sys.prefix) for file in files), files\n"
        "(plugin,) = entry_points(group='vllm.general_plugins', name='prefix_adapters')\n"
        "assert str(plugin.dist.locate_file('')).startswith(sys.prefix)"
    )
    call(commands / "python", "-c", program, folder=folder)


def test_it_answers_with_the_tokens_of_peft(server: str, folder: Path) -> None:
    plain, prefixed = json.loads(call(sys.executable, "-c", GENERATE, folder=folder))
    assert plain != prefixed
    assert complete(server, ADAPTER) == prefixed
    assert complete(server, "base") == plain
