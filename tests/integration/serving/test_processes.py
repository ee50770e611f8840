"""Servers with several processes: all give the same answers, whichever process or engine serves a request."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import server, support
from helpers.serving.runner_v2.sitecustomize import ENVIRONMENT
from helpers.serving.support import prompt_ids, text_of

pytestmark = pytest.mark.soak
CLIENTS = 8


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (("--api-server-count", "2"), {}),
        (("--data-parallel-size", "2"), {}),
        (("--tensor-parallel-size", "2"), {}),
        (("--tensor-parallel-size", "2"), ENVIRONMENT),
        (("--pipeline-parallel-size", "2"), ENVIRONMENT),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else ("runner-v2" if value else "runner-v1"),
)
def test_processes_agree(
    server_folder: Path, options: tuple[str, str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setitem(server.ENVIRONMENT, name, value)
    # Two engines or workers must not share threads.
    monkeypatch.setitem(server.ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND", "auto" if "api" in options[0] else "0|1")
    reference = support.Reference(server_folder / "model")
    prefixes = {**server.PREFIXES, "base": None}
    with server.serve(server_folder, *options, "--enable-log-requests") as client:
        check(client, reference, prefixes)
        for seed, inplace in ((21, False), (22, True)):
            prefixes["late"] = support.random_prefix(server.CONFIG, 40, seed=seed)
            path = support.write_adapter(server_folder / f"late{seed}", server.CONFIG, prefixes["late"])
            server.load(client, "late", path, load_inplace=inplace)
            check(client, reference, prefixes)
        server.unload(client, "late")
        del prefixes["late"]
        check(client, reference, prefixes)
        # Read before the server shuts down, since workers may exit before the front end.
        log = (server_folder / "log").read_text()
    answered = set(re.findall(r"\((ApiServer_\d|APIServer) .*Received request cmpl-", log))
    several = options[0] in ("--api-server-count", "--data-parallel-size")
    assert answered == ({"ApiServer_0", "ApiServer_1"} if several else {"APIServer"})
    assert ("Using V2 Model Runner" in log) == bool(environment)
    assert "ERROR" not in log


def test_a_load_that_fails_in_a_rank_is_a_503_and_no_more(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # No prefix stays on the device, so each load reads the file.
    options = ("--tensor-parallel-size", "2", "--prefix-adapter-device-memory", "0")
    folder, gone = server_folder / "poet", server_folder / "gone"
    with server.serve(server_folder, *options) as client:
        before = server.complete(client, "poet", "w5 w6").choices[0].text
        folder.rename(gone)
        with pytest.raises(openai.InternalServerError) as caught:
            server.complete(client, "poet", "w5 w6")
        assert caught.value.status_code == 503
        assert server.complete(client, "pirate", "w5 w6").model == "pirate"
        gone.rename(folder)
        assert server.complete(client, "poet", "w5 w6").choices[0].text == before
    assert "Prefix adapter 'poet': No prefix adapter at" in (server_folder / "log").read_text()


def check(client: Any, reference: support.Reference, prefixes: dict[str, Any]) -> None:
    """Requests every model over concurrent connections, so that each process serves some."""
    all_open = threading.Barrier(CLIENTS)

    def ask(number: int) -> None:
        with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as mine:
            assert {model.id for model in mine.models.list()} == prefixes.keys()
            all_open.wait()
            for name, prefix in prefixes.items():
                prompt = prompt_ids(5 + number, seed=number)
                response = server.complete(mine, name, prompt)
                expected = text_of(reference.greedy(prompt, prefix, 6))
                assert response.choices[0].text.split() == expected.split(), name
            if "late" not in prefixes:
                with pytest.raises(openai.NotFoundError):
                    server.complete(mine, "late", "w5")

    def ask_or_free_the_others(number: int) -> None:
        try:
            ask(number)
        except BaseException:
            all_open.abort()
            raise

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask_or_free_the_others, range(CLIENTS)))
