"""The path of a request through vLLM's own classes, from the model's name to its last step, without a model.

`FrontEnd` does what an API server does for a request, and `Engine` what the engine does; the CPU time of each stage is
measured. Only the forward pass is replaced, by a list of sampled tokens. All runs in one process: messages are encoded and
decoded, but not sent.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
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
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.common.interleaving import Measurement
from benchmarks.scheduler.clock import Clock

BASE = "base"
# As on a GPU: smaller blocks mean more hashes.
BLOCK_SIZE = 16
NUM_BLOCKS = 40_000
# The stages of a request, in order, and a step of all running requests.
STAGES = ("name", "check", "message", "admit", "schedule", "update", "finish")
STEP = "step"
Class = TypeVar("Class", bound=type)


def without_plugin(cls: Class) -> Class:
    """Returns a subclass of a vLLM class with all patches of the plugin undone."""
    originals = {
        name: value.__wrapped__
        for part in reversed(cls.__mro__)
        for name, value in vars(part).items()
        if isinstance(value, wrapt.FunctionWrapper)
    }
    return type(cls.__name__, (cls,), originals)  # type: ignore[return-value]


def with_plugin(cls: Class) -> Class:
    return cls


class FrontEnd:
    """The part of the API server.

    Args:
        vllm_config: The config of an engine with or without adapters.
        kind: `with_plugin` or `without_plugin`.
    """

    def __init__(self, vllm_config: VllmConfig, kind: Callable[[Any], Any]) -> None:
        self._inputs = kind(InputProcessor)(vllm_config)
        # Not constructed: a client would start its engine.
        self._client = object.__new__(kind(AsyncLLM))
        self._client.vllm_config, self._client.model_config = vllm_config, vllm_config.model_config
        self._client.input_processor, self._client.renderer = self._inputs, self._inputs.renderer
        models = kind(OpenAIServingModels)(self._client, [BaseModelPath(BASE, vllm_config.model_config.model)])
        asyncio.run(models.init_static_loras())
        self._serving = kind(BaseServing)(models, vllm_config.model_config)
        self._states = kind(RequestState)
        self._encoder, self._decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)

    def look(self, names: Iterable[str]) -> None:
        """Lets the plugin look at the adapters' files, which it does once a second, beside the requests."""
        prefixes = getattr(self._serving.models, "prefix_models", None)
        if prefixes is not None:
            asyncio.run(_resolve(prefixes, names))

    def name(self, request: CompletionRequest) -> Any:
        """Looks up the adapter by the model's name, as every endpoint does."""
        refusal = _result_of(self._serving._check_model(request))
        assert refusal is None, refusal
        return self._serving._maybe_get_adapters(request)

    def check(self, request_id: str, prompt: dict[str, Any], params: SamplingParams, adapter: Any) -> EngineCoreRequest:
        """Calls the engine's client, up to the request for the engine."""
        stream = self._client.generate(prompt, params, request_id, lora_request=adapter)
        # The arguments of the suspended generator, which another one of the plugin may have to start.
        arguments = stream.ag_frame.f_locals
        if "start" in arguments:
            arguments = arguments["start"](arguments["spec"]).ag_frame.f_locals
        adapter = arguments["lora_request"]
        request = self._inputs.process_inputs(request_id, prompt, params, ("generate",), lora_request=adapter)
        request.external_req_id = request_id
        self._states.from_new_request(
            tokenizer=None,
            request=request,
            prompt=None,
            parent_req=None,
            request_index=0,
            queue=None,
            log_stats=False,
            stream_interval=1,
        )
        return request

    def message(self, request: EngineCoreRequest) -> EngineCoreRequest:
        """Encodes the message to the engine and decodes it."""
        return self._decoder.decode(self._encoder.encode(request))

    def num_bytes(self, request: EngineCoreRequest) -> int:
        return sum(len(part) for part in self._encoder.encode(request))


class Engine:
    """The part of the engine.

    Args:
        vllm_config: The config of an engine with or without adapters.
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
        """Ends a step, with token 5 sampled for each request."""
        ids = list(output.num_scheduled_tokens)
        sampled = ModelRunnerOutput(ids, {name: index for index, name in enumerate(ids)}, [[5] for _ in ids])
        self._scheduler.update_from_output(output, sampled)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)


class RequestPath:
    """Sends requests of one kind through front end and engine, while others of the kind run.

    Args:
        front_end: The front end.
        engine: The engine.
        models: The models of the requests, used in turn.
        prompt_tokens: Random tokens of each prompt.
        shared_tokens: Tokens that all prompts start with.
        running: The number of requests that run all the time.
        steps: The number of steps of these requests per measurement.
        seed: The seed of the prompts.
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
        # Different lengths, so that they fill their last blocks in different steps.
        for index in range(running):
            self._submit(1, Clock(), extra_tokens=index % BLOCK_SIZE)
        self._step()
        assert engine.num_running == running
        # As the engine does after its start.
        gc.collect()
        gc.freeze()

    def measure(self, requests: int) -> Measurement:
        """Sends requests through all stages together, and ends them after one step.

        Returns:
            Microseconds of CPU time per request for each stage, and for a step of the running requests alone. The step in
            which the requests are scheduled is divided by their number.
        """
        clock = Clock()
        gc.disable()
        try:
            with clock.stage(STEP, self._steps):
                for _ in range(self._steps):
                    self._step()
            ids = self._submit(requests, clock)
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
        """Returns the size of the message to the engine."""
        requests: list[EngineCoreRequest] = []
        self._submit(1, Clock(), send=requests.append)
        return self._front_end.num_bytes(requests[0])

    def _submit(self, number: int, clock: Clock, extra_tokens: int = 0, send: Any = None) -> list[str]:
        """Sends requests up to the scheduler's queue, or to `send` instead of the engine."""
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
        self._front_end.look({str(body.model) for body in bodies})
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


async def _resolve(prefixes: Any, names: Iterable[str]) -> None:
    for name in names:
        await prefixes.resolve(name)


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that never suspends, without the cost of an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError(f"{coroutine!r} was suspended.")
