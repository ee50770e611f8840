"""A call that many ask for at once runs once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_plugin.adapters.single_flight import SingleFlight


def test_a_hundred_callers_share_one_call() -> None:
    flights: SingleFlight[int] = SingleFlight(2)
    go, calls = threading.Event(), [0]

    def call() -> int:
        go.wait(10)
        calls[0] += 1
        return calls[0]

    with ThreadPoolExecutor(100) as pool:
        futures = list(pool.map(lambda _: flights.start("a", call), range(100)))
        go.set()
        assert {future.result(10) for future in futures} == {1}
    # Who asks afterwards wants the state of now.
    assert flights.start("a", call).result(10) == 2


def test_other_keys_do_not_wait_for_each_other() -> None:
    flights: SingleFlight[str] = SingleFlight(2)
    go = threading.Event()
    slow = flights.start("a", lambda: str(go.wait(10)))
    assert flights.start("b", lambda: "b").result(10) == "b"
    assert not slow.done()
    go.set()
    assert slow.result(10) == "True"


def test_an_error_is_that_of_all_who_asked_and_not_of_the_next() -> None:
    flights: SingleFlight[str] = SingleFlight(1)
    go = threading.Event()

    def fail() -> str:
        go.wait(10)
        raise KeyError("a")

    futures = [flights.start("a", fail) for _ in range(3)]
    go.set()
    for future in futures:
        with pytest.raises(KeyError):
            future.result(10)
    assert flights.start("a", lambda: "fine").result(10) == "fine"


def test_who_gives_up_does_not_end_it_for_the_others() -> None:
    flights: SingleFlight[str] = SingleFlight(1)
    go = threading.Event()

    def call() -> str:
        go.wait(10)
        return "done"

    async def ask() -> str:
        # As the server waits.
        return await asyncio.shield(asyncio.wrap_future(flights.start("a", call)))

    async def main() -> str:
        blocker = flights.start("b", lambda: str(go.wait(10)))
        impatient, patient = asyncio.create_task(ask()), asyncio.create_task(ask())
        await asyncio.sleep(0.01)
        impatient.cancel()
        go.set()
        blocker.result(10)
        return await patient

    assert asyncio.run(main()) == "done"
