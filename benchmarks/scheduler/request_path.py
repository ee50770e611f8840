"""The way of a request through vLLM, from the model's name to its last step, on vLLM's own classes but without a model.

What an API server does for a request (`FrontEnd`) and what the engine does (`Engine`), each stage under the clock of this
thread's CPU time. A forward pass is a list of sampled tokens here; everything else is real, in one process and without
sockets: messages are encoded and decoded, and go nowhere between.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import wrapt
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.common.interleaving import Measurement

BASE = "base"
# Of a GPU: the more blocks, the more hashes.
BLOCK_SIZE = 16
NUM_BLOCKS = 40_000
# What a request costs, in this order, and what a step does.
STAGES = ("name", "check", "message", "admit", "schedule", "update", "finish")
STEP = "step"
Class = TypeVar("Class", bound=type)


def without_plugin(cls: Class) -> Class:
    """Returns a vLLM class as it is without any wrap of the plugin."""
    own = {
        name: value.__wrapped__
        for part in reversed(cls.__mro__)
        for name, value in vars(part).items()
        if isinstance(value, wrapt.FunctionWrapper)
    }
    return type(cls.__name__, (cls,), own)  # type: ignore[return-value]


def with_plugin(cls: Class) -> Class:
    return cls


class FrontEnd:
    """An API server's part.

    Args:
        vllm_config: Of an engine with adapters, or without.
        kind: `with_plugin` or `without_plugin`.
    """

    def __init__(self, vllm_config: VllmConfig, kind: Callable[[Any], Any]) -> None:
        self._inputs = kind(InputProcessor)(vllm_config)
        # Without an engine: a client of one starts it.
        self._client = object.__new__(kind(AsyncLLM))
        self._client.vllm_config, self._client.model_config = vllm_config, vllm_config.model_config
        self._client.input_processor, self._client.renderer = self._inputs, self._inputs.renderer
        models = kind(OpenAIServingModels)(self._client, [BaseModelPath(BASE, vllm_config.model_config.model)])
        asyncio.run(models.init_static_loras())
        self._serving = kind(BaseServing)(models, vllm_config.model_config)
        self._logprobs = kind(LogprobsProcessor)
        self._encoder, self._decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)

    def name(self, request: CompletionRequest) -> Any:
        """From the model's name to the adapter, as each endpoint does it."""
        refusal = _result_of(self._serving._check_model(request))
        assert refusal is None, refusal
        return self._serving._maybe_get_adapters(request)

    def check(self, request_id: str, prompt: dict[str, Any], params: SamplingParams, adapter: Any) -> EngineCoreRequest:
        """The call of the engine's client up to a request that the engine understands."""
        stream = self._client.generate(prompt, params, request_id, lora_request=adapter)
        # What the call goes on with, once someone reads what it streams; what it streams may be handed on by the plugin.
        stream = stream.ag_frame.f_locals.get("outputs", stream)
        adapter = stream.ag_frame.f_locals["lora_request"]
        request = self._inputs.process_inputs(request_id, prompt, params, ("generate",), lora_request=adapter)
        self._logprobs.from_new_request(tokenizer=None, request=request)
        return request

    def message(self, request: EngineCoreRequest) -> EngineCoreRequest:
        """To the engine, and read there."""
        return self._decoder.decode(self._encoder.encode(request))

    def num_bytes(self, request: EngineCoreRequest) -> int:
        return sum(len(part) for part in self._encoder.encode(request))


class Engine:
    """An engine's part.

    Args:
        vllm_config: Of an engine with adapters, or without.
        kind: `with_plugin` or `without_plugin`.
    """

    def __init__(self, vllm_config: VllmConfig, kind: Callable[[Any], Any]) -> None:
        model = vllm_config.model_config
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            dtype=torch.bfloat16,
        )
        vllm_config.cache_config.num_gpu_blocks = NUM_BLOCKS
        self._scheduler = kind(Scheduler)(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self._request = kind(Request)

    def admit(self, request: EngineCoreRequest) -> None:
        self._scheduler.add_request(self._request.from_engine_core_request(request, self._hasher))

    def schedule(self) -> Any:
        return self._scheduler.schedule()

    def update(self, output: Any) -> None:
        """Ends a step whose forward pass sampled the token 5 for each request."""
        ids = list(output.num_scheduled_tokens)
        sampled = ModelRunnerOutput(ids, {name: index for index, name in enumerate(ids)}, [[5] for _ in ids])
        self._scheduler.update_from_output(output, sampled)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)


class Way:
    """One kind of request on its way, beside others of its kind that run.

    Args:
        models: What requests name, in turn.
        prompt_tokens: Tokens that requests have to themselves.
        shared_tokens: Tokens that all of them begin with.
        running: How many run all the time.
        steps: How many steps of these alone are measured at a time.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        engine: Engine,
        models: Sequence[str],
        *,
        prompt_tokens: int,
        shared_tokens: int = 0,
        running: int = 1,
        steps: int = 10,
        seed: int = 0,
    ) -> None:
        self._front_end, self._engine, self._models = front_end, engine, models
        self._random = random.Random(seed)
        self._prompt_tokens, self._shared = prompt_tokens, self._tokens(shared_tokens)
        self._steps, self._params = steps, SamplingParams(max_tokens=4096, temperature=0.0, ignore_eos=True)
        self._count = 0
        # They fill their last blocks in different steps.
        for index in range(running):
            self._pass(1, Clock(), extra_tokens=index % BLOCK_SIZE)
        self._step()
        assert engine.num_running == running
        # As an engine does with what it starts with.
        gc.collect()
        gc.freeze()

    def measure(self, requests: int) -> Measurement:
        """Sends requests through all stages at once, and ends them after a step.

        Returns:
            Microseconds of CPU time of each stage per request (of the step that they are scheduled in: all of it, over
            their number), and of a step without them.
        """
        clock = Clock()
        gc.disable()
        try:
            with clock.stage(STEP, self._steps):
                for _ in range(self._steps):
                    self._step()
            ids = self._pass(requests, clock)
            with clock.stage("schedule", requests):
                output = self._engine.schedule()
            with clock.stage("update", requests):
                self._engine.update(output)
            with clock.stage("finish", requests):
                self._engine.finish(ids)
        finally:
            gc.enable()
        self._step()
        return {**clock.microseconds, "total": sum(clock.microseconds[stage] for stage in STAGES)}

    def num_bytes(self) -> int:
        """Returns the length of the message to the engine."""
        requests: list[EngineCoreRequest] = []
        self._pass(1, Clock(), send=requests.append)
        return self._front_end.num_bytes(requests[0])

    def _pass(self, number: int, clock: Clock, extra_tokens: int = 0, send: Any = None) -> list[str]:
        """Brings requests as far as into the scheduler's queue."""
        ids = [f"request-{self._count + index:012d}" for index in range(number)]
        bodies = [
            CompletionRequest(model=self._models[(self._count + index) % len(self._models)], prompt="x", seed=None)
            for index in range(number)
        ]
        self._count += number
        prompts = [
            {"type": "token", "prompt_token_ids": [*self._shared, *self._tokens(self._prompt_tokens + extra_tokens)]}
            for _ in range(number)
        ]
        with clock.stage("name", number):
            adapters = [self._front_end.name(body) for body in bodies]
        with clock.stage("check", number):
            requests = [
                self._front_end.check(name, prompt, self._params, adapter)
                for name, prompt, adapter in zip(ids, prompts, adapters, strict=True)
            ]
        if send is not None:
            for request in requests:
                send(request)
            return ids
        with clock.stage("message", number):
            received = [self._front_end.message(request) for request in requests]
        with clock.stage("admit", number):
            for request in received:
                self._engine.admit(request)
        return ids

    def _step(self) -> None:
        self._engine.update(self._engine.schedule())

    def _tokens(self, number: int) -> list[int]:
        return [self._random.randrange(3, 100) for _ in range(number)]


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that waits for nothing, without the cost of a loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError(f"{coroutine!r} waits for something.")


class Clock:
    """CPU time of this thread, by stage: another process on this core does not count."""

    def __init__(self) -> None:
        self.microseconds: Measurement = {}

    @contextmanager
    def stage(self, name: str, number: int) -> Iterator[None]:
        started = time.thread_time_ns()
        yield
        self.microseconds[name] = (time.thread_time_ns() - started) / 1000 / number
