"""`owner/name@revision`, downloaded with huggingface_hub from a server with two revisions of one repository."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model

LENGTHS = {"main": 5, "v1": 3}
COMMITS = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in LENGTHS}


class _Handler(BaseHTTPRequestHandler):
    """What the client asks when it downloads a snapshot: the commit of a revision, its files, and each of them."""

    folders: dict[str, Path]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        kind, _, place = path.removeprefix("/api/models").removeprefix("/user/poet/").partition("/")
        revision, _, name = place.partition("/")
        folder = self.folders.get(revision)
        if folder is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            self._answer_json({"id": "user/poet", "sha": COMMITS[revision]})
        elif kind == "tree":
            files = [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
            self._answer_json([{"type": "file", "path": file, "size": size, "oid": file} for file, size in files])
        else:
            content = (folder / name).read_bytes()
            self._answer(200, content, {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": revision})

    def _answer_json(self, body: object) -> None:
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folders = {revision: tmp_path / revision for revision in LENGTHS}
    for revision, length in LENGTHS.items():
        with_prefix(tiny_model("llama"), num_virtual_tokens=length).save_pretrained(folders[revision])
    named = {**folders, **{COMMITS[revision]: folder for revision, folder in folders.items()}}
    handler = type("Handler", (_Handler,), {"folders": named})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hub.server_port}"
        hub.shutdown()


def inspect(source: str, endpoint: str, home: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    # Ten seconds each by default, which a busy machine may need.
    environment |= {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    return subprocess.run(
        [sys.executable, "-m", "peft_prefix_ext", "inspect", source, "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_revision_is_the_requested_one(endpoint: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for source, revision in (("user/poet", "main"), ("user/poet@v1", "v1")):
        found = inspect(source, endpoint, home)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["num_virtual_tokens"] == LENGTHS[revision]
    # From the client's cache.
    found = inspect("user/poet@v1", endpoint, home, offline=True)
    assert json.loads(found.stdout)["num_virtual_tokens"] == LENGTHS["v1"]


def test_a_missing_revision_is_refused(endpoint: str, tmp_path: Path) -> None:
    found = inspect("user/poet@v2", endpoint, tmp_path / "home")
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith(
        "prefix-ext inspect: error: No prefix adapter at 'user/poet@v2': there is no such folder"
    )
    assert "(RevisionNotFoundError: " in found.stderr
