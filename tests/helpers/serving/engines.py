"""Offline engines with prefixes, whose scheduler tests can inspect, and a reference by transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import support

LENGTHS = (1, 7, 32, 33, 130)


class RunningEngine:
    """An offline engine with prefixes, seen from within.

    Args:
        llm: vLLM's `LLM`, in this process.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._counted: Counter[tuple[str, str]] = Counter()
        self.forget_counts()

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def bookkeeping(self) -> Any:
        """The plugin's part of the scheduler, with or without vLLM's `MultiConnector`."""
        connector = self.scheduler.connector
        return getattr(connector, "sub_connectors", [connector])[0].scheduler

    @property
    def writer(self) -> Any:
        """The plugin's part of the worker."""
        return self._worker_connector.writer

    @property
    def draft_writer(self) -> Any:
        """The plugin's part of the worker for the draft model's prefixes; None without a draft model."""
        return self._worker_connector.draft_writer

    @property
    def _worker_connector(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
        return getattr(connector, "sub_connectors", [connector])[0]

    def register(self, name: str, path: Path) -> None:
        """Loads the adapter in `path` under `name`, as a server does with `load_inplace`."""
        from vllm_plugin.adapters.loading import open_adapter
        from vllm_plugin.adapters.options import AdapterOption
        from vllm_plugin.adapters.registry import registry_in

        config = self.llm.llm_engine.vllm_config
        registry = registry_in(config.kv_transfer_config)
        assert registry is not None
        registry.add([open_adapter(AdapterOption(name, str(path)), config, registry)], replace=True)

    def counts(self, count: str) -> dict[str, int]:
        """Returns a count per adapter from vLLM's Prometheus registry, since `forget_counts`."""
        new = self._all_counts() - self._counted
        return {adapter: number for (name, adapter), number in new.items() if name == count}

    def forget_counts(self) -> None:
        self._counted = self._all_counts()

    def _all_counts(self) -> Counter[tuple[str, str]]:
        prefix = "vllm:prefix_adapter_"
        return Counter(
            {
                (metric.name.removeprefix(prefix), metric.labels["adapter"]): int(metric.value)
                for metric in self.llm.get_metrics()
                if metric.name.startswith(prefix)
            }
        )

    def block_ids(self) -> dict[str, list[int]]:
        """Returns the block ids of each running request in the first KV cache group."""
        manager = self.scheduler.kv_cache_manager
        return {request.request_id: manager.get_block_ids(request.request_id)[0] for request in self.scheduler.running}


@dataclass
class Engine(RunningEngine):
    """An offline engine, the model it runs, and its adapters."""

    llm: Any
    model: Path
    config: Any
    prefixes: dict[str, support.Prefix]
    reference: support.Reference = field(init=False)

    def __post_init__(self) -> None:
        super().__init__(self.llm)
        self.reference = support.Reference(self.model)

    def generate(
        self, names: list[str | None], prompts: list[list[int]], max_tokens: int = 10, **params: Any
    ) -> list[Any]:
        """Runs one batch with greedy decoding and returns vLLM's outputs."""
        from vllm import SamplingParams

        from vllm_plugin import PrefixAdapterRequest

        sampling = SamplingParams(
            **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False, **params}
        )
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=[None if name is None else PrefixAdapterRequest(name) for name in names],
            use_tqdm=False,
        )

    def check(self, names: list[str | None], prompts: list[list[int]], max_tokens: int = 10) -> None:
        """Runs one batch and compares every token with transformers."""
        outputs = self.generate(names, prompts, max_tokens)
        for name, prompt, output in zip(names, prompts, outputs, strict=True):
            prefix = None if name is None else self.prefixes[name]
            assert list(output.outputs[0].token_ids) == self.reference.greedy(prompt, prefix, max_tokens), name
            assert output.prompt_token_ids == prompt

    def check_prompt_logprobs(self, outputs: list[Any], names: list[str | None]) -> None:
        """Compares the log-probabilities of real prompt tokens with transformers."""
        for name, output in zip(names, outputs, strict=True):
            prompt = output.prompt_token_ids
            logits = self.reference.logits(prompt, None if name is None else self.prefixes[name])
            first, *rows = output.prompt_logprobs
            assert not first
            assert len(rows) == len(prompt) - 1
            for token, row, expected in zip(prompt[1:], rows, logits.log_softmax(-1), strict=False):
                assert {id: entry.logprob for id, entry in row.items()} == pytest.approx(
                    {id: float(expected[id]) for id in row}, abs=1e-3
                ), name
                assert token in row
                best = {id for id, entry in row.items() if entry.rank == 1}
                assert best <= {int(expected.argmax())}


def start(model: Path, **settings: Any) -> Any:
    """Starts an `LLM` in this process, where it has all requests of a batch before its first step.

    So scheduling and preemption do not depend on the speed of the machine.
    """
    from vllm import LLM, envs

    with pytest.MonkeyPatch.context() as environment:
        # vLLM reads these when an engine starts.
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_CI_ENV", "1")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setenv("VLLM_NO_USAGE_STATS", "1")
        # vLLM inspects model classes in a subprocess because of CUDA. These tests import them anyway.
        environment.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect())
        llm = LLM(
            **{
                "model": str(model),
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "block_size": support.BLOCK_SIZE,
                "max_model_len": 512,
                "dtype": "float32",
                "disable_log_stats": False,
                **settings,
            }
        )
    # A running engine caches its environment for the whole process, but tests change it.
    envs.disable_envs_cache()
    return llm


def make_engine(
    folder: Path,
    config: Any,
    lengths: tuple[int, ...] = LENGTHS,
    kv_transfer_config: Any = None,
    *,
    more: Mapping[str, Any] | None = None,
    prepare: Callable[[Path], None] | None = None,
    **overrides: Any,
) -> Engine:
    """Starts an offline engine with one adapter per length, named `p<length>`, and `more` that exist already.

    `prepare` changes the saved model before the engine starts.
    """
    from vllm_plugin import prefix_adapters

    if not (folder / "model").exists():
        support.write_model(folder / "model", config)
    if prepare is not None:
        prepare(folder / "model")
    prefixes = {f"p{length}": support.random_prefix(config, length, seed=length) for length in lengths}
    paths = {name: str(support.write_adapter(folder / name, config, kv)) for name, kv in prefixes.items()}
    llm = start(folder / "model", **prefix_adapters({**paths, **(more or {})}, kv_transfer_config), **overrides)
    return Engine(llm, folder / "model", config, prefixes)


class Pool:
    """Keeps one engine at a time: vLLM has one KV connector per process."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._engine: Engine | None = None
        self._kind: Any = None

    def start(self, config: Any, *args: Any, **settings: Any) -> Engine:
        """Stops the current engine and starts another."""
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self.close()
        try:
            self._engine = make_engine(self._folders.mktemp("engine"), config, *args, **settings)
        except BaseException:
            # An engine that failed to start leaves its connector, which blocks the next engine.
            ensure_kv_transfer_shutdown()
            raise
        return self._engine

    def shared(self, kind: Callable[[], Any], **settings: Any) -> Engine:
        """Returns the current engine if it has this config and these settings, else starts another."""
        if self._engine is None or self._kind != (kind, settings):
            self.start(kind(), **settings)
            self._kind = (kind, settings)
        assert self._engine is not None
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.llm.llm_engine.engine_core.shutdown()
        self._engine = self._kind = None


@contextmanager
def file_gone(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Moves the folder of an adapter that was read before away, and empties the worker's pools, as after an eviction."""
    from vllm_plugin import PrefixAdapterRequest
    from vllm_plugin.adapters.runtime_loading import adapter_of
    from vllm_plugin.worker.prefix_manager import LRUPool

    for pool in ("_on_device", "_on_host"):
        monkeypatch.setattr(engine.writer._manager, pool, LRUPool(0))
    folder = Path(adapter_of(PrefixAdapterRequest(name), engine.llm.llm_engine.vllm_config).path)
    folder.rename(folder.with_name("gone"))
    try:
        yield
    finally:
        folder.with_name("gone").rename(folder)
