"""Is what the engine says with a prefix what the model says with it? One model, one engine.

    python -m benchmarks.gpu.steps.parity --model llama --dtype float32 --out llama.json
    python -m benchmarks.gpu.steps.parity --model 8B --dtype bfloat16 --out 8B.json --options '{"kv_cache_dtype": "fp8"}'

Prompts and prefixes of several lengths, mixed with the base model: with an empty cache, with a full one, and after a reset
or a sleep. In float32 every token must be that of `PeftModel.generate`. In any dtype, along the tokens that the engine
chose, its log-probabilities are compared with those of the model in float32 (`engine`), as transformers' own in the same
dtype are (`transformers`). What the engine does without a prefix (`base`) says what its arithmetic is worth: with one it
may be no worse.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import MODELS, config_of, write_model
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.steps.arguments import device_of, parser_of

PROMPTS = (3, 31, 64, 150)
BASE, PREFIXES = "base", "prefixes"
# Of log-probabilities in float32, where the base model's own distance is next to nothing.
LEAST_DISTANCE = 1e-5
Case = tuple[str | None, int]
Turn = Mapping[Case, Any]


@dataclass
class Group:
    """The answers of the base model, or those with a prefix.

    Args:
        answers: How many.
        equal: How many of them are those of `PeftModel.generate`.
        tokens: Tokens of all answers.
        best: How many of them the model finds the best, in float32.
        engine: The distance of the engine's log-probability from the model's in float32, per token.
        transformers: The same of transformers in the engine's dtype.
    """

    answers: int = 0
    equal: int = 0
    tokens: int = 0
    best: int = 0
    engine: list[float] = field(default_factory=list)
    transformers: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return {**vars(self), "engine": summary(self.engine), "transformers": summary(self.transformers)}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("parity", __doc__)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[33, 64, 5, 256], help="virtual tokens of the prefixes"
    )
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (default: 24)")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of LLM, as JSON")
    parser.add_argument(
        "--sleep", action="store_true", help="sleep and wake up before the last turn, instead of a reset"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = check(options, Path(folder))
    found["seconds"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0 if found["ok"] else 1


def check(options: Namespace, folder: Path) -> dict[str, Any]:
    """Writes the model and its prefixes into an empty folder, serves them, and compares all answers."""
    device, dtype = device_of(options), getattr(torch, options.dtype)
    lengths = {f"p{length}": length for length in options.lengths}
    base = write_model(folder, options.model, dtype, device, lengths)
    if device == "cuda":
        torch.cuda.empty_cache()  # of this process; the engine may have one of its own
    prompts = random_prompts(config_of(options.model).vocab_size)
    adapters = {name: folder / name for name in lengths}
    turns, facts = served(options, base, adapters, prompts)
    exact = Reference(base, adapters, torch.float32, device)
    same = exact if dtype == torch.float32 else Reference(base, adapters, dtype, device)
    groups = {BASE: Group(), PREFIXES: Group()}
    for turn in turns:
        for (name, index), output in turn.items():
            compare(groups[PREFIXES if name else BASE], name, prompts[index], output, exact, same)
    distinct = len({str(first_scores(turns[0], name, len(prompts))) for name in (None, *lengths)})
    return {
        "model": options.model,
        "dtype": options.dtype,
        "options": options.options,
        "facts": facts,
        "groups": {name: group.record() for name, group in groups.items()},
        "distinct": distinct,
        "ok": distinct == len(lengths) + 1 and is_right(groups, dtype),
    }


def random_prompts(vocabulary: int) -> list[list[int]]:
    """Returns prompts of the lengths `PROMPTS`, of tokens that are not special."""
    return [
        torch.randint(5, vocabulary, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in PROMPTS
    ]


def served(
    options: Namespace, base: Path, adapters: Mapping[str, Path], prompts: Sequence[list[int]]
) -> tuple[list[Turn], dict[str, Any]]:
    """Runs all prompts with each prefix and without, in three turns.

    Returns:
        vLLM's outputs of each turn, and facts about the engine.
    """
    from vllm import LLM, SamplingParams

    from vllm_plugin import PrefixAdapterRequest, prefix_adapters

    settings: dict[str, Any] = {
        **{"dtype": options.dtype, "max_model_len": 1024, "skip_tokenizer_init": True},
        # The reference needs the rest of a GPU.
        **({"enforce_eager": True, "block_size": 32} if options.dry_run else {"gpu_memory_utilization": 0.35}),
        **({"enable_sleep_mode": True} if options.sleep else {}),
        **options.options,
    }
    start = time.perf_counter()
    llm = LLM(model=str(base), **settings, **prefix_adapters({name: str(path) for name, path in adapters.items()}))
    facts = {**facts_of(llm.llm_engine.vllm_config), "start_seconds": round(time.perf_counter() - start, 1)}
    sampling = SamplingParams(
        max_tokens=options.new_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=1
    )
    cases: list[Case] = [(name, index) for name in (None, *adapters) for index in range(len(prompts))]
    turns: list[Turn] = []
    for number, order in enumerate((cases, cases[::-1], cases)):
        if number == 2 and options.sleep:
            llm.sleep(1)
            llm.wake_up()
        elif number == 2 and not llm.reset_prefix_cache():
            raise RuntimeError("The prefix cache was not reset.")
        requests: list[Any] = [{"prompt_token_ids": prompts[index]} for _, index in order]
        prefixes: list[Any] = [name and PrefixAdapterRequest(name) for name, _ in order]
        outputs = llm.generate(requests, sampling, lora_request=prefixes, use_tqdm=False)
        turns.append(dict(zip(order, outputs, strict=True)))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return turns, facts


def facts_of(config: Any) -> dict[str, Any]:
    """Returns what an engine's `VllmConfig` says of the path that its steps take."""
    return {
        "async_scheduling": config.scheduler_config.async_scheduling,
        "block_size": config.cache_config.block_size,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "compilation_mode": str(config.compilation_config.mode),
        "model_runner_v2": bool(config.use_v2_model_runner),
    }


def compare(group: Group, name: str | None, prompt: list[int], output: Any, exact: Reference, same: Reference) -> None:
    """Adds one answer to its group."""
    answer, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    if list(output.prompt_token_ids) != prompt:
        raise AssertionError(f"The engine returned another prompt with {name}: {output.prompt_token_ids}.")
    said = torch.tensor([step[token].logprob for step, token in zip(steps, answer, strict=True)])
    scores = exact.scores(name, prompt, answer)
    own = scores if same is exact else same.scores(name, prompt, answer)
    group.answers += 1
    # Of half the precision no reference is exact, token by token.
    group.equal += same is exact and answer == exact.generate(name, prompt, len(answer))
    group.tokens += len(answer)
    group.best += int((scores.of_answer == scores.of_best).sum())
    group.engine += (said - scores.of_answer).abs().tolist()
    group.transformers += (own.of_answer - scores.of_answer).abs().tolist()


def first_scores(turn: Turn, name: str | None, num_prompts: int) -> list[float]:
    """Returns the best log-probability of the first token of each answer: prefixes that do nothing show the same."""
    steps = [turn[name, index].outputs[0].logprobs[0] for index in range(num_prompts)]
    return [round(max(token.logprob for token in step.values()), 3) for step in steps]


def is_right(groups: Mapping[str, Group], dtype: torch.dtype) -> bool:
    """Returns whether prefixes are served as well as the base model is."""
    ours, base = groups[PREFIXES], groups[BASE]
    if dtype == torch.float32 and ours.equal != ours.answers:
        return False
    limit = max(mean(base.engine), mean(ours.transformers), LEAST_DISTANCE)
    return mean(ours.engine) <= 2 * limit


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns the mean, the 99th percentile and the maximum."""
    ordered = sorted(values)
    return {"mean": mean(values), "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], "max": ordered[-1]}


if __name__ == "__main__":
    sys.exit(main())
