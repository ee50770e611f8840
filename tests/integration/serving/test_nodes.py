"""A server on two nodes, which share neither temporary folders nor caches: each reads the adapters by itself."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import server, support
from helpers.serving.server import complete, load
from helpers.serving.support import prompt_ids, text_of

pytestmark = pytest.mark.soak
NODES = ("head", "other")
REPOSITORY, REVISION = "someone/parrot", "0123456789abcdef0123456789abcdef01234567"
PREFIXES = {
    name: support.random_prefix(server.CONFIG, length, seed=length)
    for name, length in {"here": 32, "parrot": 7, "stored": 17, "late": 40, "headless": 23}.items()
}


def write_hub_cache(folder: Path, adapter: Path) -> None:
    """Writes an adapter as a download of `REPOSITORY` leaves it."""
    repository = folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(adapter, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, one for all that each node writes, and beside them the model and the storage, which both can read."""
    folder = server.write_models(tmp_path_factory.mktemp("nodes"))
    for name, prefix in PREFIXES.items():
        support.write_adapter(folder / "storage" / name, server.CONFIG, prefix)
    for node in NODES:
        for part in ("tmp", "hub"):
            (folder / node / part).mkdir(parents=True)
        write_hub_cache(folder / node / "hub", folder / "storage" / "parrot")
    return folder


def node_environment(folder: Path, node: str) -> dict[str, str]:
    own = folder / node
    return {
        **server.ENVIRONMENT,
        "TMPDIR": str(own / "tmp"),
        "HF_HOME": str(own / "hub"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(own / "cache"),
        "VLLM_HOST_IP": "127.0.0.1",
        # Both nodes are one machine here, and must not share threads.
        "VLLM_CPU_OMP_THREADS_BIND": str(NODES.index(node)),
        "OMP_NUM_THREADS": "1",
    }


def start(folder: Path, node: str, *options: str) -> subprocess.Popen[Any]:
    """Starts one node, for which the folders of the other one are empty."""
    (other,) = (each for each in NODES if each != node)
    # Shared memory tells vLLM's workers whether they are on one node.
    in_namespace = 'mount -t tmpfs none /dev/shm && mount -t tmpfs none "$0" && exec "$@"'
    with (folder / f"{node}.log").open("w") as log:
        return subprocess.Popen(
            [
                *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", in_namespace, str(folder / other)),
                *server.command(folder, *options),
            ],
            env=node_environment(folder, node),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def client(nodes: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    sources = {"here": nodes / "storage" / "here", "parrot": REPOSITORY, "stored": f"file://{nodes}/storage/stored"}
    common = (
        *("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"),
        *("--master-port", str(free_port()), "--distributed-executor-backend", "mp"),
        *("--prefix-adapter", *(f"{name}={source}" for name, source in sources.items())),
    )
    processes = [
        start(nodes, "head", *common, "--node-rank", "0", "--port", str(port)),
        start(nodes, "other", *common, "--node-rank", "1", "--headless"),
    ]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while not server.answers(client):
            if any(process.poll() is not None for process in processes):
                logs = [(nodes / f"{node}.log").read_text()[-4000:] for node in NODES]
                raise AssertionError("\n\n".join(logs))
            time.sleep(0.5)
        yield client
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def check(client: openai.OpenAI, nodes: Path, names: list[str]) -> None:
    reference = support.Reference(nodes / "model")
    jobs = [(name, prompt_ids(9 + 4 * seed, seed=seed)) for seed in range(2) for name in names]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: complete(client, *job).choices[0].text.split(), jobs))
    expected = [text_of(reference.greedy(prompt, PREFIXES.get(name), 6)).split() for name, prompt in jobs]
    assert answers == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


@pytest.mark.timeout(600)
def test_each_node_reads_the_adapters_by_itself(client: openai.OpenAI, nodes: Path) -> None:
    check(client, nodes, ["base", "here", "parrot", "stored"])
    # By the server, at run time: the other node has never heard of this one.
    load(client, "late", f"file://{nodes}/storage/late")
    check(client, nodes, ["base", "late", "stored"])


@pytest.mark.timeout(600)
def test_the_node_that_cannot_read_an_adapter_is_named(client: openai.OpenAI, nodes: Path) -> None:
    shutil.copytree(nodes / "storage" / "headless", nodes / "head" / "headless")
    load(client, "headless", nodes / "head" / "headless")
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, "headless", prompt_ids(9))
    assert caught.value.status_code == 503
    log = (nodes / "other.log").read_text()
    assert "Prefix adapter 'headless': No prefix adapter at" in log
    assert f"This was node {platform.node()!r}; every node needs the folder" in log
    check(client, nodes, ["base", "here"])
