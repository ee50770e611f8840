"""Hybrids: behind a prefix, recurrent layers start from its trained states, or from zero if it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.serving.architectures import LENGTHS, forget_engine
from helpers.serving.cpu_defects import avoid_defects
from helpers.serving.engines import Pool, file_gone
from helpers.serving.hybrids import HYBRIDS, ServedHybrid

# A gated delta rule, and layers with attention and Mamba-2 each; LFM2 has tests of its own below.
SHORT = ("qwen3_next", "falcon_h1")
Serve = Callable[..., ServedHybrid]


@pytest.fixture
def serve(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a separate engine, and stops the shared one."""
    pool.close()
    forget_engine()
    avoid_defects(monkeypatch)
    served: list[ServedHybrid] = []

    def start(name: str, **settings) -> ServedHybrid:
        served.append(ServedHybrid(name, tmp_path, HYBRIDS[name], **settings))
        if settings.get("tensor_parallel_size", 1) == 1:
            served[0].fill_with_noise()
        return served[0]

    yield start
    for one in served:
        one.close()
    forget_engine()


def states_matter(served: ServedHybrid) -> None:
    """Checks that no two prefixes, and no prefix with states and without, give the same answer."""
    assert len({tuple(logprobs) for _, logprobs in served.expected}) == len(served.requests)
    prompts = len(served.prompt_lengths)
    tokens = [answer for answer, _ in served.expected]
    names = [name for name, _ in served.requests[::prompts]]
    by_name = {name: tokens[number * prompts : (number + 1) * prompts] for number, name in enumerate(names)}
    for length in LENGTHS:
        assert by_name[f"p{length}"] != by_name[f"s{length}"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.soak) for name in HYBRIDS]
)
def test_same_tokens_as_transformers(name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(name)
    states_matter(served)
    served.check()
    served.check()
    assert served.llm.reset_prefix_cache()
    served.fill_with_noise()
    served.check()


# By name: settings of the engine.
SETTINGS: dict[str, dict] = {
    "chunked": {"max_num_batched_tokens": 64, "max_num_seqs": 4},
    # Too few blocks for all requests.
    "preempted": {"num_gpu_blocks_override": 16, "max_num_seqs": 8},
    "without prefix caching": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, marks=[] if (name, settings) == ("lfm2", "preempted") else pytest.mark.soak)
        for name in ("lfm2", *SHORT)
        for settings in SETTINGS
    ],
)
def test_same_tokens_in_other_engines(name: str, settings: str, serve: Serve) -> None:
    served = serve(name, **SETTINGS[settings])
    served.check()
    served.check()
    if settings == "preempted":
        assert served.metric("vllm:num_preemptions")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["lfm2", *SHORT])
def test_tensor_parallel(name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers that are forked have this process's replacements of what the CPU build gets wrong.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    served = serve(name, tensor_parallel_size=2, distributed_executor_backend="mp")
    served.check()
    served.check()


@pytest.mark.parametrize("name", ["lfm2"])
def test_a_failed_load(name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails only its requests, and leaves nothing wrong in the cache for when the file is back."""
    served = serve(name)
    for adapter in ("s32", "p45"):
        # What lies in the prefix cache needs no file.
        assert served.llm.reset_prefix_cache()
        with file_gone(served, adapter, monkeypatch):
            for _ in range(2):
                for (theirs, _), output, (expected, _) in zip(
                    served.requests, served.outputs(), served.expected, strict=True
                ):
                    tokens = list(output.outputs[0].token_ids)
                    assert tokens == ([] if theirs == adapter else expected), theirs
        served.check()
