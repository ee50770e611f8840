"""Custom logits processors, given by name or by entry points of an installed package, see real prompts only.

`test_runner_v2.py` runs these tests again with model runner V2, which has processors of another kind.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids

# The forbidden tokens depend on the whole prompt. Requests opt in to the second processor.
RULES = """
import torch

def by_length(prompt):
    return torch.arange(128) % 3 == len(prompt) % 3

def by_content(prompt):
    return torch.arange(128) % 5 == sum(prompt) % 5
"""
V1 = """
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

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
# These also compare what else they can read with the prompt: lengths, positions and the tokens so far.
V2 = """
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

class ByLength(LogitsProcessor):
    forbidden = staticmethod(by_length)

    def __init__(self, vllm_config, req_states):
        self.states, self.tokens, self.applied = req_states, req_states.all_token_ids.gpu, {}

    def applies(self, params):
        return True

    def add_request(self, req_idx, params):
        self.applied[req_idx] = self.applies(params)
        return self.applied[req_idx]

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            total = int(self.states.total_len.gpu[slot])
            if not self.applied[slot] or ctx.pos[row] + 1 < self.states.prefill_len.np[slot]:
                continue
            assert ctx.pos[row] == total - 1 == ctx.seq_lens_upper_bound_np[row] - 1
            assert ctx.input_ids[row] == self.tokens[slot, total - 1]
            assert self.states.prompt_len.gpu[slot] == self.states.prompt_len.np[slot]
            prompt = self.tokens[slot, : self.states.prompt_len.np[slot]].tolist()
            logits[row, self.forbidden(prompt)] = float("-inf")
        return logits

class ByContent(ByLength):
    forbidden = staticmethod(by_content)

    def applies(self, params):
        return (params.extra_args or {}).get("by_content", False)
"""


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module with two processors, one of them an entry point of an installed package."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "prompt_processors.py").write_text(
        RULES + (V2 if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else V1)
    )
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
