"""Engines without a server, each in a process of its own: vLLM's `LLM`, or `PeftModel.generate`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

from benchmarks.common.interleaving import Measurement
from benchmarks.common.latency import summarize
from benchmarks.common.workload import PromptRequest

Runner = Callable[[Sequence[PromptRequest], int], Measurement]
# Front end and engine share one process.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


class Engine:
    """An engine in a process of its own, idle between measurements; a context manager that ends the process.

    Args:
        make: Called in the new process; returns the function that runs a batch of requests.
        arguments: The arguments of `make`.
        environment: Variables added to the environment of the process.
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

    def run(self, requests: Sequence[PromptRequest], output_tokens: int) -> Measurement:
        """Runs a batch of requests and returns throughput and latency."""
        self._pipe.send((list(requests), output_tokens))
        measured: Measurement = self._receive()
        return measured

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("The process of an engine has ended; see its output above.") from None


def _serve(pipe: Connection, environment: Mapping[str, str], make: Callable[..., Runner], arguments: Any) -> None:
    os.environ.update(environment)
    run = make(*arguments)
    pipe.send("ready")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(run(*arguments))


def vllm_engine(
    settings: Mapping[str, Any], prefixes: Mapping[str, Path] | None = None, loras: Mapping[str, Path] | None = None
) -> Runner:
    """Creates an `LLM` and returns the function that runs a batch.

    Args:
        settings: The arguments of `LLM`.
        prefixes: The folders of prefixes by name; enables the plugin's connector.
        loras: The folders of LoRA adapters by name.
    """
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    connector: dict[str, Any] = {}
    adapters: dict[str | None, Any] = {None: None}
    if prefixes:
        from vllm_plugin import PrefixAdapterRequest, prefix_adapters

        connector = prefix_adapters({name: str(path) for name, path in prefixes.items()})
        adapters |= {name: PrefixAdapterRequest(name) for name in prefixes}
    adapters |= {
        name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate((loras or {}).items(), start=1)
    }
    llm = LLM(**{"skip_tokenizer_init": True, "disable_log_stats": False, **settings, **connector})
    blocks = _BlockCounter(llm)

    def run(requests: Sequence[PromptRequest], output_tokens: int) -> Measurement:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        loads, blocks.most = _loads(llm), 0
        start = time.perf_counter()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=request.prompt) for request in requests],
            params,
            lora_request=[adapters[request.adapter] for request in requests],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        metrics = [output.metrics for output in outputs if output.metrics is not None]
        return {
            **summarize(
                seconds,
                sum(len(output.outputs[0].token_ids) for output in outputs),
                [one.first_token_latency for one in metrics],
                [(one.last_token_ts - one.first_token_ts) / max(1, output_tokens - 1) for one in metrics],
            ),
            "cached_tokens": mean(output.num_cached_tokens or 0 for output in outputs),
            "blocks": blocks.most,
            "loads_per_request": (_loads(llm) - loads) / len(requests),
        }

    return run


class _BlockCounter:
    """Records the maximum number of KV cache blocks in use, after each step."""

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
    """Loads a `PeftModel` with one prefix and returns the function that runs a batch by one `generate`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import peft_prefix_ext  # noqa: F401, registers the method with PEFT in this process

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), device_map=device)
    prefixed = PeftModel.from_pretrained(base, adapter).eval()

    @torch.inference_mode()
    def run(requests: Sequence[PromptRequest], output_tokens: int) -> Measurement:
        start = time.perf_counter()
        prompts = torch.tensor([request.prompt for request in requests], device=device)
        outputs = prefixed.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
        )
        outputs = outputs.cpu()
        return {
            "tokens_per_second": (outputs.shape[1] - prompts.shape[1]) * len(requests) / (time.perf_counter() - start)
        }

    return run
