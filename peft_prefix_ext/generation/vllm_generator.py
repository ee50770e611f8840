"""Answers and log-probabilities by an offline vLLM engine: batched, with prefixes in blocks that requests share.

It imports without vLLM.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm.auto import tqdm

from peft_prefix_ext.generation.generator import TokenIds, TopLogprobs
from peft_prefix_ext.generation.vllm_engine import engine_arguments, load_prefix, request_of

# On a CPU vLLM asks for 92 % of all memory, and does not start while other processes hold more than the rest.
_CPU_CACHE_BYTES = 4 << 30
# Of the GPU memory that this process leaves free.
_FREE_SHARE = 0.9
# vLLM's value for the longest context that its cache has room for, up to the model's own.
_LONGEST = -1
# Seconds for the engine's processes to end by themselves.
_SHUTDOWN_TIMEOUT = 30


class VLLMGenerator:
    """A `Generator` of a model in vLLM, which runs in processes of its own until `close`.

    Answers end where those of transformers' `generate` end: with an end-of-sequence token of the model's generation config.
    As a context manager it closes itself. In a script, use it below `if __name__ == "__main__"`: vLLM's processes import
    the script again.

    Args:
        model: Folder or Hub repository of the base model and its tokenizer.
        dtype: The data type of weights and activations.
        max_model_len: The longest sequence in tokens, virtual ones included; by default the model's own, or less if the
            cache has no room for one of that length.
        prefixes: Folder of each prefix by name, to load at the start; `add_prefix` loads more.
        prefix_adapter_device_memory: Memory for prefixes beside the cache in GiB, 0.5 by default. On a CPU, a prefix that
            does not fit is read from its file for each answer that `score` gets.
        progress: Whether to show progress bars.
        engine: More keyword arguments of vLLM's `LLM`. Without them, `kv_cache_memory_bytes` is 4 GiB on a CPU (or what
            `VLLM_CPU_KVCACHE_SPACE` says) and `enforce_eager` is on there; if this process uses a GPU,
            `gpu_memory_utilization` is 90 % of what is free on it.

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If a prefix cannot be served on this model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        max_model_len: int | None = None,
        prefixes: Mapping[str, str | Path] | None = None,
        prefix_adapter_device_memory: float | None = None,
        progress: bool = True,
        **engine: Any,
    ) -> None:
        folders = {name: str(folder) for name, folder in (prefixes or {}).items()}
        connector = engine_arguments(folders, prefix_adapter_device_memory)
        from vllm import LLM

        self.progress = progress
        self._prefixes = set(prefixes or ())
        settings = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": _LONGEST if max_model_len is None else max_model_len,
            "max_logprobs": -1,  # as many per token as `score` is asked for
            **_device_settings(),
            **connector,
            **engine,
        }
        self._llm: Any = LLM(**settings)
        ends = self._llm.model_config.try_get_generation_config().get("eos_token_id")
        self.eos_token_ids: list[int] = [ends] if isinstance(ends, int) else list(ends or [])

    def __enter__(self) -> VLLMGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's processes, and so frees its memory. Calling it again has no effect."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_TIMEOUT)
            self._llm = None
            gc.collect()  # an engine within this process is a circle of references

    def add_prefix(self, name: str, folder: str | Path) -> None:
        """Loads a prefix under a name, in place of the one that has this name.

        A folder that was trained further may be given again, and is read again.

        Raises:
            ValueError: If there is no prefix in the folder, or it cannot be served on this model.
        """
        load_prefix(self._running, name, folder)
        self._prefixes.add(name)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        prefix: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[TokenIds]:
        """Returns an answer to each prompt; see `Generator.generate`.

        A sampled answer depends on the seed and on the prompt's place among the prompts, so equal prompts have different
        answers.

        Raises:
            ValueError: If there is no such prefix, or a prompt leaves no room for an answer.
            RuntimeError: If the prefix is no longer in its folder.
        """
        common = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            # Of these, not of the tokenizer's own, which would stop where transformers goes on.
            "ignore_eos": True,
            "stop_token_ids": self.eos_token_ids,
        }
        seeds = random.Random(seed)
        params = [{**common, "seed": seeds.getrandbits(32)} for _ in prompts]
        return [list(output.outputs[0].token_ids) for output in self._run(prompts, params, prefix, "Answering")]

    def score(
        self, prompts: Sequence[TokenIds], answers: Sequence[TokenIds], *, top_k: int, prefix: str | None = None
    ) -> list[TopLogprobs]:
        """Returns the most probable tokens where each token of each answer stands; see `Generator.score`.

        Raises:
            ValueError: If there is no such prefix, or an answer does not fit into the context.
            RuntimeError: If the prefix is no longer in its folder.
        """
        scores = [TopLogprobs([], [], []) for _ in prompts]
        pairs = zip(prompts, answers, strict=True)
        given = {index: (list(prompt), list(answer)) for index, (prompt, answer) in enumerate(pairs) if answer}
        # The engine is made to generate the last token, so an answer may reach to the end of the context.
        texts = [prompt + answer[:-1] for prompt, answer in given.values()]
        k = min(top_k, self._running.model_config.get_vocab_size())
        common = {"temperature": 0.0, "max_tokens": 1, "logprobs": k, "prompt_logprobs": k}
        params = [{**common, "allowed_token_ids": answer[-1:]} for _, answer in given.values()]
        outputs = self._run(texts, params, prefix, "Scoring")
        for (index, (prompt, answer)), output in zip(given.items(), outputs, strict=True):
            scores[index] = _scores(output, len(prompt), answer, k)
        return scores

    @property
    def _running(self) -> Any:
        if self._llm is None:
            raise RuntimeError("This generator is closed; create another one.")
        return self._llm

    def _run(
        self, prompts: Sequence[TokenIds], params: Sequence[Mapping[str, Any]], prefix: str | None, title: str
    ) -> list[Any]:
        """Runs one batch and returns vLLM's outputs, in the order of the prompts.

        Args:
            prompts: The prompts.
            params: The fields of `SamplingParams` of each.
            prefix: The name of the prefix, if any.
            title: The title of the progress bar.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        llm = self._running
        if prefix is not None and prefix not in self._prefixes:
            raise ValueError(f"There is no prefix {prefix!r}; load it by `add_prefix({prefix!r}, FOLDER)`.")
        if not prompts:
            return []
        try:
            outputs: list[Any] = llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                # No text, and a few long lists of log-probabilities instead of an object for each.
                [SamplingParams(**fields, detokenize=False, flat_logprobs=True) for fields in params],
                lora_request=request_of(prefix),
                use_tqdm=_bar(title) if self.progress else False,
            )
        except VLLMValidationError as error:
            raise ValueError(str(error)) from error
        if any(output.outputs[0].finish_reason == "error" for output in outputs):
            raise RuntimeError(
                f"The prefix {prefix!r} is no longer in its folder, or was changed there; load it again by `add_prefix`."
            )
        return outputs


def _device_settings() -> dict[str, Any]:
    """Returns the arguments of `LLM` for the memory that the engine takes, beside a model in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return {"gpu_memory_utilization": _FREE_SHARE * free / total}
    return {}


def _bar(title: str) -> Callable[..., Any]:
    """Returns what vLLM makes its progress bars by."""

    def bar(prompts: Any = None, **settings: Any) -> Any:
        # One for the answers, and none for the prompts, which are token ids already.
        return tqdm(prompts, **{**settings, "desc": title, "disable": prompts is not None})

    return bar


def _scores(output: Any, num_prompt_tokens: int, answer: TokenIds, top_k: int) -> TopLogprobs:
    """Returns what vLLM's output says about an answer, whose last token is the one it has generated."""
    # The log-probabilities at each place by token id: of the k best, and of the token that stands there.
    rows = [output.prompt_logprobs[index] for index in range(num_prompt_tokens, len(output.prompt_token_ids))]
    rows.append(output.outputs[0].logprobs[0])
    best = [sorted(row, key=lambda token: -row[token].logprob)[:top_k] for row in rows]
    return TopLogprobs(
        ids=best,
        logprobs=[[row[token].logprob for token in tokens] for row, tokens in zip(rows, best, strict=True)],
        answer=[row[token].logprob for row, token in zip(rows, answer, strict=True)],
    )
