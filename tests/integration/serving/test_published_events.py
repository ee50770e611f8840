"""KV events of an engine, by vLLM's own publisher, as a router receives them that knows nothing of prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.router import Router
from helpers.serving.support import BLOCK_SIZE, prompt_ids

# How long the publisher's thread may take, in milliseconds.
QUIET = 300


class Subscriber:
    """Receives the events of an engine over ZMQ."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def receive(self) -> list[Any]:
        events = []
        while self._socket.poll(QUIET):
            _, _, payload = self._socket.recv_multipart()
            events += self._decoder.decode(payload).events
        return events

    def close(self) -> None:
        self._socket.close(linger=0)


def publishing(endpoint: str) -> dict[str, Any]:
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
    # Small enough that blocks are evicted.
    return {"kv_events_config": events, "num_gpu_blocks_override": 40}


def listen(engine: Engine, endpoint: str) -> Subscriber:
    """Returns a subscriber that misses nothing: a publisher drops what it sends before somebody has subscribed."""
    subscriber = Subscriber(endpoint)
    for seed in range(20):
        engine.generate([None], [prompt_ids(2 * BLOCK_SIZE, seed=100 + seed)])
        if subscriber.receive():
            break
    else:
        raise AssertionError("No event came.")
    assert engine.llm.reset_prefix_cache()
    return subscriber


@pytest.fixture(scope="module")
def replica(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Subscriber]]:
    endpoint = f"ipc://{tmp_path_factory.mktemp('events')}/socket"
    engine = pool.start(support.llama_config(), **publishing(endpoint))
    subscriber = listen(engine, endpoint)
    yield engine, subscriber
    subscriber.close()
    pool.close()


def num_published(name: str | None, prompt: list[int], num_outputs: int) -> int:
    """Returns how many blocks of a prompt are in the cache after a request. The last output token never is."""
    p = 0 if name is None else int(name[1:])
    num_blocks = (p + len(prompt) + num_outputs - 1) // BLOCK_SIZE - -(-p // BLOCK_SIZE)
    return min(num_blocks, len(prompt) // BLOCK_SIZE)


def test_a_router_finds_prompts_under_the_name_in_model(replica: tuple[Engine, Subscriber]) -> None:
    engine, subscriber = replica
    assert engine.llm.reset_prefix_cache()
    subscriber.receive()
    router = Router(BLOCK_SIZE)
    names = [None, *engine.prefixes]
    prompts = {name: prompt_ids(100, seed=seed) for seed, name in enumerate(names)}
    for name, prompt in prompts.items():
        engine.check([name], [prompt])
    events = subscriber.receive()
    router.receive(events)
    for name, prompt in prompts.items():
        expected = num_published(name, prompt, 10)
        assert expected >= 2
        assert {other: router.match(other, prompt) for other in names} == {
            other: expected if other == name else 0 for other in names
        }
    assert {event.lora_name for event in events if isinstance(event, BlockStored)} == set(names)
    assert router.num_orphans == router.num_unknown == 0


def test_what_a_router_expects_is_there(replica: tuple[Engine, Subscriber]) -> None:
    """More requests than the cache holds. What the events say is what the engine then finds."""
    engine, subscriber = replica
    assert engine.llm.reset_prefix_cache()
    subscriber.receive()
    router = Router(BLOCK_SIZE)
    found: set[int] = set()
    turns = [(name, prompt_ids(100, seed=seed)) for seed in range(3) for name in (None, "p7", "p32", "p33", "p130")]
    # Some that were just sent, and some that were sent long ago.
    for turn in (0, 1, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9, 8, 7, 0, 10, 11, 12, 13, 14, 14, 13, 12, 2, 1):
        name, prompt = turns[turn]
        router.receive(subscriber.receive())
        expected = router.match(name, prompt)
        (output,) = engine.generate([name], [prompt])
        assert output.num_cached_tokens // BLOCK_SIZE == expected, (turn, name)
        found.add(expected)
    assert {0, 2, 3} <= found
    assert router.num_orphans == router.num_unknown == 0


def test_the_adapters_in_memory_are_known(replica: tuple[Engine, Subscriber]) -> None:
    engine, _ = replica
    engine.generate(["p33"], [prompt_ids(5)])
    residency = {
        (metric.labels["adapter"], metric.labels["tier"]): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name == "vllm:prefix_adapter_residency"
    }
    assert residency["p33", "device"] == 1


def test_layers_with_windows(pool: Pool, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    engine = pool.start(support.gemma3_config(), (32, 33), **{**publishing(endpoint), "num_gpu_blocks_override": 200})
    subscriber = listen(engine, endpoint)
    subscriber.receive()
    router, prompt = Router(BLOCK_SIZE), prompt_ids(150)
    names = (None, "p32", "p33")
    expected = dict.fromkeys(names, 0)
    for name in names:
        engine.check([name], [prompt])
        router.receive(subscriber.receive())
        expected[name] = num_published(name, prompt, 10)
        assert expected[name] == 4
        assert {other: router.match(other, prompt) for other in names} == expected
    assert router.num_orphans == router.num_unknown == 0
    subscriber.close()
    pool.close()
