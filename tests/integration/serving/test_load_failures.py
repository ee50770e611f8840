"""Loads that fail: whom they take with them, and what may not stay in the cache when the file is back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.engines import Engine, Pool, file_gone
from helpers.serving.support import prompt_ids
from vllm_plugin.scheduler.load_failures import STEPS_IN_FLIGHT, RecentBlocks, recent_blocks_of


def fails_without_its_file(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for a prefix whose file is gone, in one batch with others, and again when the file is back."""
    prompts = [prompt_ids(70, seed=seed) for seed in (1, 1, 4, 2, 3)]
    names = [name, name, name, None, "p7"]
    with file_gone(engine, name, monkeypatch):
        for _ in range(2):
            outputs = engine.generate(names, prompts)
            assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 3 + ["length"] * 2
            assert [len(output.outputs[0].token_ids) for output in outputs] == [0, 0, 0, 10, 10]
    for _ in range(2):
        engine.check(names, prompts)


def test_a_failed_load_with_several_kv_cache_groups(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pool.shared(support.gemma3_config)
    assert engine.llm.reset_prefix_cache()
    fails_without_its_file(engine, "p33", monkeypatch)


# Of an aligned prefix, all but the first request of a step have blocks that the first one loads.
@pytest.mark.parametrize("name", ["p33", "p32"])
def test_a_failed_load_fails_only_its_requests_and_leaves_nothing_in_the_cache(
    llama: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_without_its_file(llama, name, monkeypatch)


def test_aborted_requests_of_a_failed_load_leave_nothing_in_the_cache(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import RequestStatus

    from vllm_plugin import PrefixAdapterRequest

    engine, update = llama.llm.llm_engine, llama.scheduler.update_from_output
    # The second one has the block that the first one was to load, and blocks of its own behind it.
    prompts = [prompt_ids(70, seed=seed) for seed in (1, 4)]
    ids = [
        engine.add_request(
            f"gone-{index}",
            {"type": "token", "prompt_token_ids": prompt},
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
            lora_request=PrefixAdapterRequest("p32"),
        )
        for index, prompt in enumerate(prompts)
    ]

    def abort_first(*args: Any) -> Any:
        """As vLLM does when clients hang up while a step runs."""
        llama.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        return update(*args)

    with file_gone(llama, "p32", monkeypatch), monkeypatch.context() as aborted:
        aborted.setattr(llama.scheduler, "update_from_output", abort_first)
        # Where steps overlap, the outcome of the first is known in the second.
        engine.step()
        engine.step()
    engine.abort_request(ids, internal=True)
    for _ in range(2):
        llama.check(["p32", "p32"], prompts)


def request() -> Any:
    return SimpleNamespace()


def test_a_bad_block_expands_to_its_requests() -> None:
    given = RecentBlocks()
    given.add(request(), ([1, 2, 3], [8, 9]))
    given.add(request(), ([1, 4], [0, 7]))
    given.add(request(), ([5, 6], [0, 10]))
    assert given.expand_to_requests({2}) == {1, 2, 3, 8, 9}
    # Both of the first two have it; the null block is no block in common.
    assert given.expand_to_requests({1}) == {1, 2, 3, 4, 8, 9, 0, 7}
    assert given.expand_to_requests({99}) == {99}


def test_blocks_of_all_recent_steps_count() -> None:
    given, preempted = RecentBlocks(), request()
    given.add(preempted, ([1, 2],))
    given.next_step()
    # Elsewhere after a preemption; when it ends, its first block has left a window.
    given.add(preempted, ([3, 4],))
    given.add(preempted, ([0, 4, 5],))
    assert given.expand_to_requests({1}) == {1, 2}
    assert given.expand_to_requests({4}) == {0, 3, 4, 5}


def test_old_steps_are_forgotten() -> None:
    given, long, short = RecentBlocks(), request(), request()
    given.add(long, ([1, 2],))
    given.add(short, ([3],))
    for _ in range(STEPS_IN_FLIGHT - 1):
        given.next_step()
    given.add(short, ([3, 4],))
    assert given.expand_to_requests({1}) == {1, 2}
    assert recent_blocks_of(long) == ([1, 2],)
    given.next_step()
    assert given.expand_to_requests({1}) == {1}
    # Its blocks may be another request's by now.
    assert recent_blocks_of(long) == ()
    assert recent_blocks_of(short) == ([3, 4],)
    assert len(given) == 1
