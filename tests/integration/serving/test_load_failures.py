"""A failed load fails only its requests, and leaves no wrong blocks in the cache for when the file is back."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.engines import Engine, Pool, file_gone
from helpers.serving.support import prompt_ids


def fails_without_its_file(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests a prefix whose file is gone, in one batch with others, and again when the file is back."""
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


# With an aligned prefix, the first request of a step loads blocks that the others share.
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
    # The second request shares the block that the first one loads, and has its own blocks after it.
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
        """As vLLM does when clients disconnect while a step runs."""
        llama.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        return update(*args)

    with file_gone(llama, "p32", monkeypatch), monkeypatch.context() as aborted:
        aborted.setattr(llama.scheduler, "update_from_output", abort_first)
        # With async scheduling, the outcome of the first step is known in the second.
        engine.step()
        engine.step()
    engine.abort_request(ids, internal=True)
    for _ in range(2):
        llama.check(["p32", "p32"], prompts)
