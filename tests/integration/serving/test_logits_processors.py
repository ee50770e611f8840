"""Custom logits processors, given by name or by entry points of an installed package, see real prompts only."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters.validation import check_engine
from vllm_plugin.errors import PrefixServeError

# The forbidden tokens depend on the whole prompt. Requests opt in to the second processor.
MODULE = """
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

def by_length(prompt):
    return torch.arange(128) % 3 == len(prompt) % 3

def by_content(prompt):
    return torch.arange(128) % 5 == sum(prompt) % 5

class ByLength(AdapterLogitsProcessor):
    forbidden = staticmethod(by_length)

    @classmethod
    def validate_params(cls, params): ...

    def is_argmax_invariant(self):
        return False

    def applies(self, params):
        return True

    def new_req_logits_processor(self, params):
        def apply(prompt, output, logits):
            return logits.masked_fill(self.forbidden(prompt), float("-inf"))

        return apply if self.applies(params) else None

class ByContent(ByLength):
    forbidden = staticmethod(by_content)

    def applies(self, params):
        return (params.extra_args or {}).get("by_content", False)
"""


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module with two processors, one of them an entry point of an installed package."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "prompt_processors.py").write_text(MODULE)
    info = folder / "prompt_processors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prompt-processors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.logits_processors]\nlength = prompt_processors:ByLength\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("prompt_processors")


@pytest.fixture(scope="module")
def engine(pool: Pool, processors: Any) -> Iterator[Engine]:
    from vllm.v1.sample import logits_processor

    logits_processor.cached_load_custom_logitsprocs.cache_clear()
    # Few blocks and short steps, so prompts are split into chunks and requests preempted.
    settings = {"max_model_len": 352, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 17}
    yield pool.start(
        support.llama_config(), (1, 7, 32, 45), logits_processors=["prompt_processors:ByContent"], **settings
    )
    pool.close()
    logits_processor.cached_load_custom_logitsprocs.cache_clear()


def expected(engine: Engine, processors: Any, name: str | None, prompt: list[int], by_content: bool) -> list[int]:
    forbidden = processors.by_length(prompt)
    if by_content:
        forbidden |= processors.by_content(prompt)
    output: list[int] = []
    for _ in range(10):
        logits = engine.reference.logits([*prompt, *output], None if name is None else engine.prefixes[name])[-1]
        output.append(int(logits.masked_fill(forbidden, -torch.inf).argmax()))
    return output


def test_processors_see_the_prompts_of_clients(engine: Engine, processors: Any) -> None:
    requests = [(name, prompt_ids(n, seed=n)) for n in (1, 3, 40, 70) for name in (None, *engine.prefixes)]
    names, prompts = [name for name, _ in requests], [prompt for _, prompt in requests]
    for by_content in (False, True):
        answers = [expected(engine, processors, *request, by_content) for request in requests]
        for _ in range(2):
            outputs = engine.generate(names, prompts, extra_args={"by_content": by_content})
            assert [list(output.outputs[0].token_ids) for output in outputs] == answers


def test_model_runner_v2_does_not_start_with_them(
    processors: Any, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32"}
    config = EngineArgs(**settings, **prefix_adapters(one=str(adapter))).create_engine_config()
    for v2, given, named in (
        ("0", ["x:Y"], None),
        ("1", None, ""),
        ("1", ["x:Y"], "x:Y; "),
        ("1", [processors.ByContent], "prompt_processors:ByContent; "),
    ):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2)
        config.model_config.logits_processors = given
        if named is None:
            check_engine(config)
            continue
        with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
            check_engine(config)
        assert (
            f"do not support custom logits processors in model runner V2 ({named}prompt_processors:ByLength, of the entry "
            "points of an installed package; with VLLM_USE_V2_MODEL_RUNNER=0 in the environment they work) yet"
        ) in str(caught.value)
