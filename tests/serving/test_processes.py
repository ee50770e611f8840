"""Servers of several processes: whichever a client reaches, and whichever engine runs its request, all agree."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from serving import server, support
from serving.support import prompt_ids, text_of

pytestmark = pytest.mark.soak
CLIENTS = 8


@pytest.mark.parametrize("options", [("--api-server-count", "2"), ("--data-parallel-size", "2")], ids=" ".join)
def test_processes_agree(server_folder: Path, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Two engines may not share their threads.
    monkeypatch.setitem(server.ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND", "0|1" if "data" in options[0] else "auto")
    reference = support.Reference(server_folder / "model")
    prefixes = {**server.PREFIXES, "base": None}
    with server.serve(server_folder, *options, "--enable-log-requests") as client:
        check(client, reference, prefixes)
        for seed, inplace in ((21, False), (22, True)):
            prefixes["late"] = support.random_prefix(server.CONFIG, 40, seed=seed)
            path = support.write_adapter(server_folder / f"late{seed}", server.CONFIG, prefixes["late"])
            body = {"prefix_name": "late", "prefix_path": str(path), "load_inplace": inplace}
            client.post("/load_prefix_adapter", body=body, cast_to=str)
            check(client, reference, prefixes)
        client.post("/unload_prefix_adapter", body={"prefix_name": "late"}, cast_to=str)
        del prefixes["late"]
        check(client, reference, prefixes)
    log = (server_folder / "log").read_text()
    answered = set(re.findall(r"\((ApiServer_\d) .*Received request cmpl-", log))
    assert answered == {"ApiServer_0", "ApiServer_1"}
    assert "ERROR" not in log


def check(client: Any, reference: support.Reference, prefixes: dict[str, Any]) -> None:
    """Asks for every model through connections that are open at the same time, so that each process has some."""
    all_open = threading.Barrier(CLIENTS)

    def ask(number: int) -> None:
        with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as mine:
            assert {model.id for model in mine.models.list()} == prefixes.keys()
            all_open.wait(300)
            for name, prefix in prefixes.items():
                prompt = prompt_ids(5 + number, seed=number)
                response = server.complete(mine, name, prompt)
                expected = text_of(reference.greedy(prompt, prefix, 6))
                assert response.choices[0].text.split() == expected.split(), name
            if "late" not in prefixes:
                with pytest.raises(openai.NotFoundError):
                    server.complete(mine, "late", "w5")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))
