"""The server's life: ready, answered health checks, a start that fails; and the comparison of answers."""

import sys

import pytest
from parity import count_equal
from serve import Answer, Server

HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_server_lives_for_the_with_block(tmp_path):
    server = Server("model", {}, tmp_path / "logs" / "server.log")
    server._command = [sys.executable, "-c", HEALTHY, str(server.port)]
    with server:
        assert server.ready_seconds > 0
        assert server._process.poll() is None
    assert server._process.poll() is not None


def test_server_that_fails_to_start_shows_its_log(tmp_path):
    server = Server("model", {}, tmp_path / "server.log")
    server._command = [sys.executable, "-c", "raise SystemExit('no such adapter')"]
    with pytest.raises(RuntimeError, match="no such adapter"), server:
        pass


def test_server_serves_each_adapter_by_name(tmp_path):
    command = Server("model", {"describe": tmp_path / "a", "extract": tmp_path / "b"}, tmp_path / "log")._command
    start = command.index("--prefix-adapter")
    assert command[start + 1 : start + 3] == [f"describe={tmp_path / 'a'}", f"extract={tmp_path / 'b'}"]


def test_count_equal_wants_the_tokens_of_prompt_and_answer_every_time():
    answer = Answer("text", (4, 5), (1, 2))
    other_answer = Answer("text", (4, 6), (1, 2))
    other_prompt = Answer("text", (4, 5), (1, 3))
    expected = [answer] * 4
    cold = [answer, other_answer, answer, answer]
    warm = [answer, answer, other_prompt, answer]
    assert count_equal(expected, cold, warm) == 2
    assert count_equal([], [], []) == 0
