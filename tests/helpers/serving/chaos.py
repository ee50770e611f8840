"""Random requests on an engine in this process, each compared with its own reference.

All events are drawn from one seeded generator, step by step of the engine, so a failure is reproducible.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.serving.engines import RunningEngine

NUM_WAITING = 6


@dataclass
class Content:
    """One content of an adapter: a prefix in a folder, and its greedy answers to all prompts."""

    path: Path | None
    answers: list[list[int]]


@dataclass
class Running:
    """A running request, and the identity of the requests it may share blocks with."""

    expected: list[int]
    max_tokens: int
    identity: tuple[Any, ...]


@dataclass
class Chaos:
    """Runs random requests on an engine while adapters are replaced, requests aborted and the cache reset.

    Args:
        engine: The engine, in this process.
        prompts: Prompts in vLLM's form.
        contents: The two contents of each adapter, the first of which is loaded.
        base: The answers of the base model.
        random: Draws all that happens.
        resets: Whether the prefix cache is reset while requests run.
    """

    engine: RunningEngine
    prompts: Sequence[dict[str, Any]]
    contents: dict[str, list[Content]]
    base: Content
    random: random.Random
    resets: bool = True
    running: dict[str, Running] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def run(self, num_requests: int) -> None:
        """Runs requests, and checks that each answer is its own and that every event happened often enough."""
        original = self.engine.scheduler._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            self.happened["preempt"] += 1
            original(request, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine.scheduler, "_preempt_request", preempt)
            self._run(num_requests)
        happened = self.happened
        assert happened["answer"] + happened["abort"] == num_requests
        caches = self.engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        events = ["abort", "replace", "preempt", *(["reset"] if self.resets else []), *(["shared"] if caches else [])]
        assert all(happened[what] > num_requests // 100 for what in events), happened
        assert not caches or sum(self.engine.counts("block_hits").values()) > num_requests // 20

    def _run(self, num_requests: int) -> None:
        numbers = iter(range(num_requests))
        core = self.engine.llm.llm_engine
        # The current content of each name.
        self.current = {name: versions[0] for name, versions in self.contents.items()}
        while True:
            while len(self.running) < NUM_WAITING + self.random.randrange(6):
                if (number := next(numbers, None)) is None:
                    break
                self.add(f"{id(self)}-{number}")
            if not self.running:
                return
            self.disturb()
            for output in core.step():
                self.check(output)
            self.check_blocks()

    def add(self, request_id: str) -> None:
        from vllm import SamplingParams

        from vllm_plugin import PrefixAdapterRequest

        name = self.random.choice([None, *self.contents])
        content = self.base if name is None else self.current[name]
        index = self.random.randrange(len(self.prompts))
        max_tokens = self.random.randint(1, len(content.answers[index]))
        salt = self.random.choice([None, None, "a", "b"])
        # With these, vLLM skips its prefix cache.
        prompt_logprobs = self.random.choice([None] * 9 + [1])
        prompt = self.prompts[index]
        self.engine.llm.llm_engine.add_request(
            request_id,
            {**prompt, "cache_salt": salt} if salt else prompt,
            SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                prompt_logprobs=prompt_logprobs,
            ),
            lora_request=None if name is None else PrefixAdapterRequest(name),
        )
        self.running[request_id] = Running(content.answers[index], max_tokens, (name, content.path, salt))

    def disturb(self) -> None:
        draw = self.random.random()
        if draw < 0.04:
            request_id = self.random.choice(list(self.running))
            self.engine.llm.llm_engine.abort_request([request_id])
            del self.running[request_id]
            self.happened["abort"] += 1
        elif draw < 0.06 and self.resets:
            # All running requests start again.
            preempted = self.happened["preempt"]
            assert self.engine.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            self.happened["preempt"] = preempted
            self.happened["reset"] += 1
        elif draw < 0.10:
            self.replace(self.random.choice(list(self.contents)))
            self.happened["replace"] += 1

    def replace(self, name: str) -> None:
        """Replaces the content of an adapter, as `/v1/load_prefix_adapter` does with `load_inplace`."""
        (other,) = (content for content in self.contents[name] if content is not self.current[name])
        self.engine.register(name, other.path)
        self.current[name] = other

    def check(self, output: Any) -> None:
        request = self.running.get(output.request_id)
        if request is None:
            return  # aborted
        tokens = list(output.outputs[0].token_ids)
        assert tokens == request.expected[: len(tokens)], (output.request_id, request.identity)
        if output.finished:
            assert len(tokens) == request.max_tokens, (output.request_id, output.outputs[0].finish_reason)
            del self.running[output.request_id]
            self.happened["answer"] += 1

    def check_blocks(self) -> None:
        """Requests share a physical block only if adapter, content and client salt are the same."""
        owners: dict[int, tuple[Any, ...]] = {}
        scheduler = self.engine.scheduler
        for request in scheduler.running:
            # vLLM appends a suffix that makes it unique.
            running = self.running.get(request.request_id.rpartition("-")[0])
            if running is None:
                continue
            # All KV cache groups share one pool; 0 is the null block.
            blocks = set().union(*scheduler.kv_cache_manager.get_block_ids(request.request_id)) - {0}
            for block in blocks:
                assert owners.setdefault(block, running.identity) == running.identity, block
            self.happened["shared"] += len(blocks)
        self.happened["shared"] -= len(owners)
