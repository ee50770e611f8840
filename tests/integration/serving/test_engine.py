"""The offline engine: its output with a prefix, and how often it copies one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import support
from helpers.serving.engines import LENGTHS, Engine, Pool, make_engine
from helpers.serving.support import prompt_ids


@pytest.mark.parametrize("length", LENGTHS)
def test_matches_transformers_cold_warm_and_after_reset(llama: Engine, length: int) -> None:
    name = f"p{length}"
    prompts = [prompt_ids(count, seed=count) for count in (1, 20, 32, 70)]
    for round_number in range(3):
        if round_number == 2:
            assert llama.llm.reset_prefix_cache()
        llama.check([name] * 4, prompts)


def test_mixes_the_base_and_two_adapters_in_one_batch(llama: Engine) -> None:
    names = [None, "p33", "p7", "p33", None, "p7"]
    same = prompt_ids(40)
    prompts = [same, same, same, prompt_ids(9, seed=1), prompt_ids(65, seed=2), prompt_ids(1, seed=3)]
    for _ in range(2):
        llama.check(names, prompts)
    outputs = llama.generate([None, "p33", "p7"], [same] * 3)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 3


def test_an_aligned_prefix_is_loaded_once_and_its_blocks_are_shared(llama: Engine) -> None:
    from vllm import SamplingParams

    from vllm_plugin import PrefixAdapterRequest

    llm_engine = llama.llm.llm_engine
    for index in range(6):
        llm_engine.add_request(
            str(index),
            {"type": "token", "prompt_token_ids": prompt_ids(10 + index, seed=index)},
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
            lora_request=PrefixAdapterRequest("p32"),
        )
    llm_engine.step()
    llm_engine.step()
    blocks = list(llama.block_ids().values())
    assert len(blocks) == 6
    assert len({ids[0] for ids in blocks}) == 1
    assert len({ids[1] for ids in blocks}) == 6
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    assert llama.counts("loads") == {"p32": 1}
    assert llama.counts("loaded_tokens") == {"p32": 32}


def test_only_the_tail_of_an_unaligned_prefix_is_loaded_again(llama: Engine) -> None:
    llama.check(["p130"] * 4, [prompt_ids(5, seed=seed) for seed in range(4)])
    assert llama.counts("loads") == {"p130": 4}
    assert llama.counts("loaded_tokens") == {"p130": 130 + 3 * 2}
    assert llama.counts("requests") == {"p130": 4}
    assert llama.counts("block_hits") == {"p130": 3 * (130 // 32)}


def test_cached_tokens_count_real_tokens_only(llama: Engine) -> None:
    prompt = prompt_ids(70)
    before = prompt_tokens(llama)
    cold, warm = (llama.generate(["p33"], [prompt])[0] for _ in range(2))
    assert prompt_tokens(llama) - before == 2 * 70
    assert cold.num_cached_tokens == 0
    # 33 + 70 tokens fill three blocks of 32, of which the last two hold 63 real ones.
    assert warm.num_cached_tokens == 63


def prompt_tokens(engine: Engine) -> int:
    """Returns how many prompt tokens vLLM's own metrics count."""
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:prompt_tokens")


def test_n_samples_share_the_prefix(llama: Engine) -> None:
    prompt = prompt_ids(12)
    (output,) = llama.generate(["p33"], [prompt], n=3, temperature=1.0, seed=1, top_k=1)
    expected = llama.reference.greedy(prompt, llama.prefixes["p33"], 10)
    assert [list(sample.token_ids) for sample in output.outputs] == [expected] * 3


def test_a_repetition_penalty_ignores_virtual_tokens(llama: Engine) -> None:
    prompt = prompt_ids(6)
    (output,) = llama.generate(["p33"], [prompt], max_tokens=8, repetition_penalty=1.8)
    tokens = list(prompt)
    for _ in range(8):
        logits = llama.reference.logits(tokens, llama.prefixes["p33"])[-1].clone()
        for token in set(tokens):
            logits[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8
        tokens.append(int(logits.argmax()))
    assert list(output.outputs[0].token_ids) == tokens[6:]


def test_output_stops_at_the_end_of_the_context(llama: Engine) -> None:
    prompt = prompt_ids(512 - 130 - 5)
    (output,) = llama.generate(["p130"], [prompt], max_tokens=400)
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"
    (shortest,) = llama.generate(["p130"], [prompt_ids(512 - 130 - 1)], max_tokens=None)
    assert len(shortest.outputs[0].token_ids) == 1


def test_an_aborted_request_leaves_nothing_behind(llama: Engine) -> None:
    from vllm import SamplingParams

    from vllm_plugin import PrefixAdapterRequest

    llm_engine = llama.llm.llm_engine
    for steps in range(3):
        request_id = llm_engine.add_request(
            f"abort-{steps}",
            {"type": "token", "prompt_token_ids": prompt_ids(10)},
            SamplingParams(max_tokens=50, ignore_eos=True, detokenize=False),
            lora_request=PrefixAdapterRequest("p33"),
        )
        for _ in range(steps):
            llm_engine.step()
        llm_engine.abort_request([request_id], internal=True)
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
    assert llama.bookkeeping._num_loadable == {}
    llama.check(["p33", None], [prompt_ids(10), prompt_ids(10)])


def test_a_reset_with_requests_running_loads_again(llama: Engine) -> None:
    from vllm import SamplingParams

    from vllm_plugin import PrefixAdapterRequest

    engine = llama.llm.llm_engine
    prompts = {str(seed): prompt_ids(10, seed=seed) for seed in range(3)}
    for request_id, prompt in prompts.items():
        engine.add_request(
            request_id,
            {"type": "token", "prompt_token_ids": prompt},
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
            lora_request=PrefixAdapterRequest("p33"),
        )
    for _ in range(3):
        engine.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step()}
    assert outputs == {
        request_id: llama.reference.greedy(prompt, llama.prefixes["p33"], 8) for request_id, prompt in prompts.items()
    }
    assert llama.counts("loaded_tokens") == {"p33": 2 * (33 + 1 + 1)}


def test_wakes_up_with_another_cache(llama: Engine) -> None:
    names, prompts = ["p33", "p130", None], [prompt_ids(40, seed=seed) for seed in range(3)]
    llama.check(names, prompts)
    llama.llm.sleep(level=1)
    # The CPU worker keeps its cache during sleep. Other workers discard it.
    for _, modules in llama.writer._stacks:
        for module in modules:
            module.kv_cache.normal_()
    llama.llm.wake_up()
    llama.check(names, prompts)


def test_client_salts_do_not_share(llama: Engine) -> None:
    from vllm import SamplingParams

    from vllm_plugin import PrefixAdapterRequest

    for salt in ("one", "two"):
        llama.llm.generate(
            {"prompt_token_ids": prompt_ids(5), "cache_salt": salt},
            SamplingParams(max_tokens=1, detokenize=False),
            lora_request=PrefixAdapterRequest("p32"),
            use_tqdm=False,
        )
    assert llama.counts("loads") == {"p32": 2}


def test_a_second_engine_in_the_process_is_refused(llama: Engine, tmp_path: Path) -> None:
    from vllm_plugin.errors import PrefixServeError

    with pytest.raises(PrefixServeError, match="Another engine with a KV connector runs in this process"):
        make_engine(tmp_path, support.llama_config(), (8,))
    llama.check(["p33", None], [prompt_ids(5)] * 2)


# 17 blocks of 32 tokens, one of them vLLM's null block: eight requests of 33 + 20 + 60 tokens do not fit at once.
SMALL: dict[str, Any] = {
    **{"lengths": (33, 64), "num_gpu_blocks_override": 17, "max_model_len": 352, "max_num_batched_tokens": 48}
}


def test_survives_preemption_and_eviction_in_a_small_cache(pool: Pool) -> None:
    engine = pool.shared(support.llama_config, **SMALL)
    preempted: list[Any] = []
    original = engine.scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append((request.num_computed_tokens, request.num_prompt_tokens))
        original(request, *args, **kwargs)

    engine.scheduler._preempt_request = preempt
    names = ["p33", "p64", None, "p33", "p64", "p33", None, "p64"]
    engine.check(names, [prompt_ids(20, seed=seed) for seed in range(8)], max_tokens=60)
    assert preempted
    assert engine.counts("loads")["p33"] > 3

    # Five short prompts take 6 blocks and soon need 5 more; the long one, in chunks, needs all remaining blocks.
    names = ["p33", None, None, None, None, "p33"]
    prompts = [*(prompt_ids(28, seed=seed) for seed in range(5)), prompt_ids(280)]
    for _ in range(2):
        preempted.clear()
        engine.check_prompt_logprobs(engine.generate(names, prompts, max_tokens=30, prompt_logprobs=1), names)
        assert any(33 < computed < prompt == 313 for computed, prompt in preempted)


def test_recently_used_prefixes_are_evicted_last(pool: Pool) -> None:
    """vLLM frees the first blocks of a request last, so a prefix in regular use stays in the cache without pinning."""
    engine = pool.shared(support.llama_config, **SMALL)
    assert engine.llm.reset_prefix_cache()
    engine.forget_counts()
    for seed in range(8):
        # Of 16 blocks, 5 for this and 3 for the next: 8 rounds fill the cache four times.
        engine.check([None], [prompt_ids(150, seed=seed)], max_tokens=2)
        engine.check(["p64"], [prompt_ids(5, seed=seed)], max_tokens=2)
    assert engine.counts("loads") == {"p64": 1}
    assert engine.counts("block_hits") == {"p64": 7 * 2}
    for seed in range(4):
        engine.check([None], [prompt_ids(150, seed=10 + seed)], max_tokens=2)
    engine.check(["p64"], [prompt_ids(5)], max_tokens=2)
    assert engine.counts("loads") == {"p64": 2}
    assert engine.llm.reset_prefix_cache()


def test_chunked_prefill_and_no_prefix_caching(engine_factory: Callable[..., Engine]) -> None:
    engine = engine_factory(
        support.llama_config(), (33, 64), enable_prefix_caching=False, max_num_batched_tokens=48, max_num_seqs=4
    )
    names = ["p33", "p64", None, "p64"]
    for _ in range(2):
        engine.check(names, [prompt_ids(100 + seed, seed=seed) for seed in range(4)])
    assert engine.counts("loads") == {"p33": 2, "p64": 4}
    assert engine.counts("loaded_tokens") == {"p33": 66, "p64": 256}


def test_runs_under_a_multi_connector(engine_factory: Callable[..., Engine]) -> None:
    others = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": []}}
    engine = engine_factory(support.llama_config(), (32, 33), others)
    assert type(engine.scheduler.connector).__name__ == "MultiConnector"
    for _ in range(2):
        engine.check(["p32", None, "p33"], [prompt_ids(40)] * 3)
    assert engine.counts("loads") == {"p32": 1, "p33": 1}


def test_loads_do_not_need_the_forward_context(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    assert not connector.requires_piecewise_for_cudagraph({})
    # With a full CUDA graph there is no forward context with attention metadata.
    load = connector.start_load_kv
    monkeypatch.setattr(connector, "start_load_kv", lambda forward_context, **kwargs: load(None))
    llama.check(["p33", None, "p130"], [prompt_ids(40, seed=seed) for seed in range(3)])
    assert llama.counts("loads") == {"p33": 1, "p130": 1}


def test_sliding_window_layers_let_the_prefix_slide_out(pool: Pool) -> None:
    engine = pool.shared(support.gemma3_config)
    assert len(engine.scheduler.kv_cache_config.kv_cache_groups) > 1
    names = [None, "p1", "p7", "p32", "p33", "p130", "p130"]
    prompts = [prompt_ids(count, seed=count) for count in (30, 90, 5, 70, 33, 1, 150)]
    for round_number in range(3):
        if round_number == 2:
            assert engine.llm.reset_prefix_cache()
        engine.check(names, prompts, max_tokens=24)
