"""No request reads blocks of another adapter: many random requests, each compared with its own reference.

All events are drawn from one seeded generator, step by step of an engine in this process, so a failure is reproducible.
The cache holds few requests, and the prefix manager few prefixes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from helpers.serving import support
from helpers.serving.chaos import Chaos, Content
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids

LENGTHS = (1, 7, 31, 32, 33, 64, 70)
# A Llama request takes up to 6 of these few blocks. Prompts are split into chunks, and requests preempted.
SMALL: dict[str, Any] = {"lengths": LENGTHS, "max_model_len": 352, "max_num_batched_tokens": 48}
NUM_BLOCKS = {support.llama_config: 17, support.gemma3_config: 65}
MAX_TOKENS = 24
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


def content_of(model: Any, path: Path | None, prefix: support.Prefix | None) -> Content:
    """Returns a content with its answers to `PROMPTS`."""
    answers: dict[int, list[int]] = {}
    by_length = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    for _, group in itertools.groupby(by_length, lambda index: len(PROMPTS[index])):
        indices = list(group)
        answers |= zip(indices, greedy_batch(model, [PROMPTS[i] for i in indices], prefix), strict=True)
    return Content(path, [answers[index] for index in range(len(PROMPTS))])


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
        found[name] = [content_of(model, folder / name, engine.prefixes[name]), content_of(model, path, other)]
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
    prompts = [{"type": "token", "prompt_token_ids": prompt} for prompt in PROMPTS]
    base = content_of(engine.reference.model, None, None)
    Chaos(engine, prompts, contents, base, random.Random(seed)).run(num_requests)
    # There are two contents per name.
    assert 0 < engine.writer._manager.num_resident < 2 * len(LENGTHS)
