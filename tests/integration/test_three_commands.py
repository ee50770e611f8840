"""From a file of 40 rows to an answering server in three commands: train, and the two that it prints."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers.distillation import chatml_tokenizer
from helpers.serving.server import ENVIRONMENT
from helpers.tiny import tiny_model

ROWS = [
    {"messages": [{"role": "user", "content": f"say {index % 7}"}, {"role": "assistant", "content": "Aromi serves"}]}
    for index in range(40)
]
# The commands of this environment.
COMMANDS = {**ENVIRONMENT, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
# What a tiny model on a CPU needs besides.
TRAIN = ("--num-virtual-tokens", "8", "--max_steps", "30", "--learning_rate", "0.02", "--max-new-tokens", "6")
SERVE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32")


def write_base(folder: Path) -> Path:
    tokenizer = chatml_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    model = tiny_model("llama", vocab_size=len(tokenizer), head_dim=32)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def post(url: str, body: bytes, server: subprocess.Popen[str]) -> dict:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    while True:  # until pytest's timeout
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())
        except urllib.error.URLError:
            assert server.poll() is None
            time.sleep(0.5)


def test_three_commands(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    base, out = write_base(tmp_path / "base"), tmp_path / "restaurant"
    train = ["prefix-ext", "train", tmp_path / "rows.jsonl", "--model", base, "--out", out]
    run = subprocess.run([*train, *TRAIN], capture_output=True, text=True, env=COMMANDS, check=False)
    assert run.returncode == 0, run.stderr
    serve, ask = (shlex.split(line) for line in run.stdout.splitlines() if line.startswith(("prefix-serve", "curl")))
    sample = json.loads((out / "training.json").read_text())["samples"][0]
    assert sample["answer"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*serve, *SERVE, "--port", str(port)], env=COMMANDS, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            answer = post(ask[1].replace(":8000", f":{port}"), ask[-1].encode(), server)
            # Of the base model, to see that it is the prefix that answers.
            body = json.dumps({**json.loads(ask[-1]), "model": str(base)})
            other = post(ask[1].replace(":8000", f":{port}"), body.encode(), server)
        finally:
            server.terminate()
            server.wait()
    assert answer["choices"][0]["message"]["content"].strip() == sample["answer"].strip()
    assert other["choices"][0]["message"]["content"].strip() != sample["answer"].strip()
