"""The commands that the demo prints work in any folder, and query each prefix in the format that it was trained with."""

import json
import shlex
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from e2e import DESCRIBE, EXTRACT, Restaurant, examples
from next_commands import PORT, commands

CAFE = Restaurant({"name": "Cotto", "near": "Café Sicilia's"}, ('Cotto is near "Café Sicilia\'s".',))
ASKED = {task.name: examples(task, [CAFE])[0] for task in (DESCRIBE, EXTRACT)}


@pytest.fixture
def typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    return commands("my model", {name: Path(".demo", name) for name in ASKED}, ASKED)


def test_the_server_is_started_from_any_folder(typed, tmp_path):
    words = shlex.split(typed[0])
    settings = [word for word in words if "=" in word and not word.startswith(tuple(ASKED))]
    assert settings == ["VLLM_CPU_KVCACHE_SPACE=2", "HF_HUB_OFFLINE=1"]
    command, model = words[len(settings) : len(settings) + 2]
    assert Path(command).is_absolute()
    assert (Path(command).name, model) == ("prefix-serve", str(tmp_path / "my model"))
    start = words.index("--prefix-adapter") + 1
    assert words[start : start + 2] == [f"{name}={tmp_path}/.demo/{name}" for name in ASKED]


def test_a_model_on_the_hub_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, *_ = commands("owner/name", {"describe": Path("describe")}, ASKED)
    words = shlex.split(start)
    assert "owner/name" in words
    assert not any(word.startswith("HF_HUB_OFFLINE") for word in words)


def test_each_prefix_is_asked_what_it_was_trained_on(typed):
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.headers["Content-Type"], json.loads(self.rfile.read(self.length()))))
            self.send_response(200)
            self.end_headers()

        def length(self):
            return int(self.headers["Content-Length"])

        def log_message(self, *args):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for line in typed[1:]:
            at_hand = line.replace(f"localhost:{PORT}", f"127.0.0.1:{server.server_port}")
            subprocess.run(["sh", "-c", at_hand], check=True, capture_output=True)
        server.shutdown()
    assert [body["model"] for _, _, body in received] == list(ASKED)
    for path, content_type, body in received:
        assert (path, content_type) == ("/v1/chat/completions", "application/json")
        assert body["messages"] == [dict(message) for message in ASKED[body["model"]].messages]
        assert (body["temperature"], body["max_tokens"]) == (0, 64)
