"""Engines without a server, each in a process of its own: vLLM's `LLM`, or `PeftModel.generate`.

A process starts when it is made, and waits, idle, between measurements.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any

from benchmarks.common.interleaving import Measurement
from benchmarks.common.workload import Job

Runner = Callable[[Sequence[Job], int], Measurement]
# One process for front end and engine, no compiler, no news to anyone.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


class Engine:
    """An engine that answers batches of requests.

    Args:
        make: Called in the new process: makes what answers, and measures.
        arguments: Its arguments.
        environment: Variables of the new process.
    """

    def __init__(
        self, make: Callable[..., Runner], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, {**ENVIRONMENT, **(environment or {})}, make, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(30)
        self._process.kill()

    def run(self, jobs: Sequence[Job], output_tokens: int) -> Measurement:
        """Answers all requests, which come at once, and returns what was measured."""
        self._pipe.send((list(jobs), output_tokens))
        measured: Measurement = self._receive()
        return measured

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("The process of an engine has ended; what it said stands above.") from None


def _serve(pipe: Connection, environment: Mapping[str, str], make: Callable[..., Runner], arguments: Any) -> None:
    os.environ.update(environment)
    run = make(*arguments)
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(run(*job))


def vllm_engine(
    settings: Mapping[str, Any], prefixes: Mapping[str, Path] | None = None, loras: Mapping[str, Path] | None = None
) -> Runner:
    """Makes an `LLM`.

    Args:
        settings: Its arguments.
        prefixes: The folders of prefixes, by name; with them the engine has the plugin's connector.
        loras: The folders of LoRA adapters, by name.
    """
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    own: dict[str, Any] = {}
    requests: dict[str | None, Any] = {None: None}
    if prefixes:
        from vllm_plugin import PrefixAdapterRequest, prefix_adapters

        own = prefix_adapters({name: str(path) for name, path in prefixes.items()})
        requests |= {name: PrefixAdapterRequest(name) for name in prefixes}
    requests |= {
        name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate((loras or {}).items(), start=1)
    }
    llm = LLM(**{"skip_tokenizer_init": True, "disable_log_stats": False, **settings, **own})
    blocks = _Blocks(llm)

    def run(jobs: Sequence[Job], output_tokens: int) -> Measurement:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        loads, blocks.most = _loads(llm), 0
        start = time.perf_counter()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=job.prompt) for job in jobs],
            params,
            lora_request=[requests[job.adapter] for job in jobs],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        metrics = [output.metrics for output in outputs if output.metrics is not None]
        return {
            **summary(
                seconds,
                sum(len(output.outputs[0].token_ids) for output in outputs),
                [one.first_token_latency for one in metrics],
                [(one.last_token_ts - one.first_token_ts) / max(1, output_tokens - 1) for one in metrics],
            ),
            "cached_tokens": mean(output.num_cached_tokens or 0 for output in outputs),
            "blocks": blocks.most,
            "loads_per_request": (_loads(llm) - loads) / len(jobs),
        }

    return run


class _Blocks:
    """Counts the blocks of the KV cache that requests hold, after each step."""

    def __init__(self, llm: Any) -> None:
        self.most = 0
        engine = llm.llm_engine
        pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        step = engine.step
        free = pool.get_num_free_blocks()

        def counted() -> Any:
            outputs = step()
            self.most = max(self.most, free - pool.get_num_free_blocks())
            return outputs

        engine.step = counted


def _loads(llm: Any) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_adapter_loads")


def transformers_engine(model: str, adapter: Path, dtype: str, threads: int) -> Runner:
    """Makes a `PeftModel` with one prefix, that answers by one batched `generate`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), device_map=device)
    prefixed = PeftModel.from_pretrained(base, adapter).eval()

    @torch.inference_mode()
    def run(jobs: Sequence[Job], output_tokens: int) -> Measurement:
        start = time.perf_counter()
        prompts = torch.tensor([job.prompt for job in jobs], device=device)
        outputs = prefixed.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
        )
        outputs = outputs.cpu()
        return {"tokens_per_second": (outputs.shape[1] - prompts.shape[1]) * len(jobs) / (time.perf_counter() - start)}

    return run


def summary(seconds: float, num_tokens: int, first: Sequence[float], between: Sequence[float]) -> Measurement:
    """Returns what users of a server feel.

    Args:
        seconds: From the first request to the last token.
        num_tokens: How many all answers have.
        first: Seconds to the first token, of each request.
        between: Seconds from token to token, of each request in the mean.
    """
    return {
        "tokens_per_second": num_tokens / seconds,
        "ttft_p50": median(first),
        "ttft_p99": percentile(first, 0.99),
        "itl_p50": median(between),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that so many of all are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
