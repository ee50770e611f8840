"""No request reads blocks of another adapter: many random requests, each compared with its own reference.

All events are drawn from one seeded generator, step by step of an engine in this process, so a failure is reproducible.
The cache holds few requests, and the prefix manager few prefixes.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids

LENGTHS = (1, 7, 31, 32, 33, 64, 70)
# A Llama request takes up to 6 of these few blocks. Prompts are split into chunks, and requests preempted.
SMALL: dict[str, Any] = {"lengths": LENGTHS, "max_model_len": 352, "max_num_batched_tokens": 48}
NUM_BLOCKS = {support.llama_config: 17, support.gemma3_config: 65}
MAX_TOKENS = 24
NUM_WAITING = 6
# Prompts share their beginnings, so real tokens share blocks as well, but only after the same prefix.
PROMPTS = [prompt_ids(count) for count in (1, 20, 32, 40, 70)] + [
    prompt_ids(common) + prompt_ids(8, seed=seed) for common in (31, 32, 64) for seed in (1, 2)
]


@torch.no_grad()
def greedy_batch(model: Any, prompts: list[list[int]], prefix: support.Prefix | None) -> list[list[int]]:
    """Returns `MAX_TOKENS` greedy tokens for each of several prompts of one length."""
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(prefix or []):
        cache.update(*(tensor.expand(len(prompts), *tensor.shape) for tensor in (key, value)), index)
    ids, tokens = torch.tensor(prompts), []
    for _ in range(MAX_TOKENS):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1).tolist()


@dataclass
class Content:
    """One content of an adapter: a prefix in a folder, and its answers to `PROMPTS`."""

    path: Path | None
    answers: list[list[int]]

    @classmethod
    def of(cls, model: Any, path: Path | None, prefix: support.Prefix | None) -> Content:
        answers: dict[int, list[int]] = {}
        by_length = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
        for _, group in itertools.groupby(by_length, lambda index: len(PROMPTS[index])):
            indices = list(group)
            answers |= zip(indices, greedy_batch(model, [PROMPTS[i] for i in indices], prefix), strict=True)
        return cls(path, [answers[index] for index in range(len(PROMPTS))])


@dataclass
class Running:
    """A running request, and the identity of the requests it may share blocks with."""

    expected: list[int]
    max_tokens: int
    identity: tuple[Any, ...]


@dataclass
class Chaos:
    """Runs random requests on an engine while adapters are replaced, requests aborted and the cache reset."""

    engine: Engine
    contents: dict[str, list[Content]]
    base: Content
    random: random.Random
    running: dict[str, Running] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def run(self, num_requests: int) -> None:
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
        index = self.random.randrange(len(PROMPTS))
        max_tokens = self.random.randint(1, MAX_TOKENS)
        salt = self.random.choice([None, None, "a", "b"])
        # With these, vLLM skips its prefix cache.
        prompt_logprobs = self.random.choice([None] * 9 + [1])
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": PROMPTS[index]}
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
        elif draw < 0.06:
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


@pytest.fixture(scope="module")
def engine(pool: Pool, request: pytest.FixtureRequest) -> Iterator[Engine]:
    kind = request.param
    engine = pool.shared(kind, num_gpu_blocks_override=NUM_BLOCKS[kind], **SMALL)
    # 120 of 238 virtual tokens fit: keys and values of 32 numbers of 4 bytes.
    config = engine.config
    engine.writer._manager._on_device.capacity = (
        120 * config.num_hidden_layers * config.num_key_value_heads * 2 * 32 * 4
    )
    yield engine
    pool.close()


@pytest.fixture(scope="module")
def contents(engine: Engine) -> dict[str, list[Content]]:
    """Two contents per adapter; the second has the next length."""
    model, folder = engine.reference.model, engine.model.parent
    found = {}
    for name, length in zip(engine.prefixes, (*LENGTHS[1:], LENGTHS[0]), strict=True):
        other = support.random_prefix(engine.config, length, seed=1000 + length)
        path = support.write_adapter(folder / "other" / name, engine.config, other)
        found[name] = [Content.of(model, folder / name, engine.prefixes[name]), Content.of(model, path, other)]
    return found


@pytest.mark.parametrize(
    ("engine", "seed", "num_requests"),
    [
        (support.llama_config, 0, 400),
        *(pytest.param(support.llama_config, seed, 2000, marks=pytest.mark.soak) for seed in (1, 2, 3)),
        # Six KV cache groups, five of them with sliding windows.
        pytest.param(support.gemma3_config, 4, 2000, marks=pytest.mark.soak),
    ],
    indirect=["engine"],
)
def test_every_answer_is_its_own(
    engine: Engine, contents: dict[str, list[Content]], seed: int, num_requests: int
) -> None:
    engine.forget_counts()
    for name, (first, _) in contents.items():
        engine.register(name, first.path)
    chaos = Chaos(engine, contents, Content.of(engine.reference.model, None, None), random.Random(seed))
    original = engine.scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        chaos.happened["preempt"] += 1
        original(request, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler, "_preempt_request", preempt)
        chaos.run(num_requests)
    happened = chaos.happened
    # All events happened often enough.
    assert happened["answer"] + happened["abort"] == num_requests
    assert all(happened[what] > num_requests // 100 for what in ("abort", "reset", "replace", "preempt", "shared")), (
        happened
    )
    assert sum(engine.counts("block_hits").values()) > num_requests // 20
    # There are two contents per name.
    assert 0 < engine.writer._manager.num_resident < 2 * len(LENGTHS)
