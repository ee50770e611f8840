"""Cache hits that end within a block (`--prefix-match-unit`), and therefore within a prefix or shortly after it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import BLOCK_SIZE, prompt_ids, specs_in

UNIT = 8


def test_a_finer_match_unit_gives_the_same_tokens(pool: Pool) -> None:
    """Blocks of 32 in six KV cache groups; prefixes end at, before and after a unit and a block."""
    engine = pool.start(support.gemma3_config(), (7, 8, 32, 37, 45, 70), prefix_match_unit=UNIT)
    assert (engine.scheduler.block_size, engine.scheduler.hash_block_size) == (BLOCK_SIZE, UNIT)
    first = prompt_ids(20, seed=1)
    # A common beginning that ends within a block.
    prompts = [first, first + prompt_ids(6, seed=2), first[:-6] + prompt_ids(6, seed=3), prompt_ids(100)]
    for _ in range(2):
        for name in (None, *engine.prefixes):
            engine.check([name] * len(prompts), prompts)
    for prompt in prompts:
        engine.check([None, *engine.prefixes], [prompt] * (1 + len(engine.prefixes)))


class HybridScheduler:
    """vLLM's scheduler for a model with recurrent layers, where hits may end within a block; without the model."""

    def __init__(self, engine: Engine) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = copy.copy(engine.llm.llm_engine.vllm_config)
        config.cache_config = dataclasses.replace(config.cache_config, prefix_match_unit=UNIT, block_size=BLOCK_SIZE)
        config.cache_config.mamba_cache_mode = "align"
        config.cache_config.num_gpu_blocks = 64
        attention = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        state = MambaSpec(
            block_size=BLOCK_SIZE, shapes=((128, 128),), dtypes=(torch.float32,), mamba_cache_mode="align"
        )
        groups = [KVCacheGroupSpec(["model.layers.0"], attention), KVCacheGroupSpec(["model.layers.1"], state)]
        self.scheduler = Scheduler(
            config,
            KVCacheConfig(64, [], groups),
            StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=UNIT,
        )
        assert self.scheduler.mamba_partial_cache_hit
        self.specs = specs_in(config.kv_transfer_config)
        self._numbers = iter(range(100))

    def run(self, name: str, prompt: list[int]) -> tuple[int, list[tuple[int, int]]]:
        """Runs a request for one token. Returns the number of cached and loaded tokens, and the loads."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request

        from vllm_plugin.adapters.spec import pack

        transfer = {"kv_transfer_params": {"prefix_adapters": pack(self.specs[name])}}
        request_id = f"hybrid-{next(self._numbers)}"
        hasher = get_request_block_hasher(UNIT, sha256)
        params = SamplingParams(max_tokens=1, ignore_eos=True, extra_args=transfer)
        self.scheduler.add_request(Request(request_id, list(prompt), params, None, block_hasher=hasher))
        computed, loads = None, []
        while self.scheduler.has_unfinished_requests():
            step = self.scheduler.schedule()
            loads += [(load.start, load.stop) for load in step.kv_connector_metadata.loads]
            (scheduled,) = step.num_scheduled_tokens
            if computed is None:
                computed = step.scheduled_new_reqs[0].num_computed_tokens
            request = self.scheduler.requests[scheduled]
            # A token is sampled once the whole prompt is computed.
            sampled = [[5]] if request.num_computed_tokens >= request.num_prompt_tokens else [[]]
            self.scheduler.update_from_output(step, ModelRunnerOutput([scheduled], {scheduled: 0}, sampled))
        return computed, loads


@pytest.fixture
def hybrid(llama: Engine) -> HybridScheduler:
    return HybridScheduler(llama)


def test_a_hit_beyond_the_prefix_needs_no_load(hybrid: HybridScheduler) -> None:
    # 33 virtual tokens: one block, and one token of the next.
    first = prompt_ids(20, seed=1)
    assert hybrid.run("p33", first) == (33, [(0, 33)])
    # 48 of 53 tokens are cached up to the end of a unit: the prefix and 15 more.
    computed, loads = hybrid.run("p33", first + prompt_ids(6, seed=2))
    assert (computed, loads) == (48, [])
    # Another prompt finds no recurrent state to continue from.
    assert hybrid.run("p33", prompt_ids(20, seed=3)) == (33, [(0, 33)])
