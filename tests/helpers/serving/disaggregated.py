"""Two servers with vLLM's own schedulers and connectors, of which one prefills and the other decodes; without a model.

NIXL itself is not needed for the scheduler's side of the NixlConnector. What its workers would copy is in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from helpers.serving.support import BLOCK_SIZE
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters.spec import PrefixSpec, pack
from vllm_plugin.metadata import PrefixLoad

# What a router asks a server for that shall prefill.
TO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
NUM_BLOCKS = 64
SAMPLED = 5


def engine_config(model: Path, role: str) -> Any:
    """Returns the config of a server with prefixes and a NixlConnector in this role."""
    from vllm.engine.arg_utils import EngineArgs

    connector = {"kv_connector": "NixlConnector", "kv_role": role, "engine_id": role}
    settings: dict[str, Any] = {
        "max_model_len": 256,
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "async_scheduling": False,
    }
    config = EngineArgs(
        str(model), skip_tokenizer_init=True, **settings, **prefix_adapters({}, connector)
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


class Server:
    """One server.

    Args:
        config: See `engine_config`.
        window: The size of the sliding window of a second KV cache group; None for one group.
    """

    def __init__(self, config: Any, window: int | None = None) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
        from vllm.v1.structured_output import StructuredOutputManager

        sizes: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
        groups = [KVCacheGroupSpec(["model.layers.0"], FullAttentionSpec(**sizes))]
        if window is not None:
            groups.append(KVCacheGroupSpec(["model.layers.1"], SlidingWindowSpec(**sizes, sliding_window=window)))
        self.scheduler: Any = Scheduler(
            config,
            KVCacheConfig(NUM_BLOCKS, [], groups),
            StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.num_groups = len(groups)
        self._numbers = iter(range(1000))

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(
        self, prompt: list[int], spec: PrefixSpec | None, transfer: dict[str, Any] | None = None, **params: Any
    ) -> str:
        """Adds a request as the front end sends it, and returns its id."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        both = {**(transfer or {}), **({} if spec is None else {"prefix_adapters": pack(spec)})}
        request_id = f"{self.scheduler.connector._kv_transfer_config.engine_id}-{next(self._numbers)}"
        sampling = SamplingParams(
            **{"max_tokens": 1, "ignore_eos": True, **params}, extra_args={"kv_transfer_params": both}
        )
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.scheduler.add_request(Request(request_id, list(prompt), sampling, None, block_hasher=hasher))
        return request_id

    def schedule(self) -> tuple[Any, list[PrefixLoad], Any]:
        """Schedules a step. Returns it, the loads of prefixes, and what the NixlConnector's workers do."""
        step = self.scheduler.schedule()
        ours, nixl = step.kv_connector_metadata.metadata
        return step, ours.loads, nixl

    def finish(self, step: Any, *, sampled: Iterable[str] = (), **connector_output: Any) -> dict[str, Any]:
        """Ends a step and returns its outputs by request.

        Args:
            step: The step.
            sampled: The requests that get a token: those whose prompt is computed.
            connector_output: Fields of what the workers' connectors report.
        """
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        ids, sampled = list(step.num_scheduled_tokens), set(sampled)
        output = ModelRunnerOutput(
            ids,
            {request_id: index for index, request_id in enumerate(ids)},
            [[SAMPLED] if request_id in sampled else [] for request_id in ids],
            kv_connector_output=KVConnectorOutput(**connector_output),
        )
        outputs = self.scheduler.update_from_output(step, output)
        return {each.request_id: each for client in outputs.values() for each in client.outputs}

    def prefill(
        self, prompt: list[int], spec: PrefixSpec | None, **params: Any
    ) -> tuple[dict[str, Any], list[PrefixLoad]]:
        """Prefills for another server. Returns the KV transfer parameters of the response, as a router gets them, and the loads."""
        request_id = self.add(prompt, spec, dict(TO_PREFILL), **params)
        step, loads, _ = self.schedule()
        output = self.finish(step, sampled=[request_id])[request_id]
        return json.loads(json.dumps(output.kv_transfer_params)), loads

    def was_read(self, transfer: dict[str, Any]) -> None:
        """The other server has read the blocks of a request."""
        step, _, _ = self.schedule()
        self.finish(step, finished_sending={transfer["remote_request_id"]})
