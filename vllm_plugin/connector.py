"""The KV connector that brings prefixes into vLLM's paged cache: a thin shell over `scheduler.py` and `worker.py`.

Loads are synchronous: the scheduler counts the virtual tokens as computed, and the worker writes them before the
forward pass of the same step. vLLM registers the blocks as cached while it schedules that step, so a second request of
the step finds them, and reads them after the write as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_plugin.bank import PrefixBank
from vllm_plugin.compat import require
from vllm_plugin.config import specs_in
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.geometry import cache_layers, stacks_of
from vllm_plugin.scheduler import PrefixLoad, PrefixScheduler
from vllm_plugin.worker import PrefixWriter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class PrefixMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers of one step."""

    loads: list[PrefixLoad] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads trained prefixes; see the module's docstring."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        # An engine in a process of its own has not made its config there.
        require(server=False)
        self.scheduler: PrefixScheduler | None = None
        self.writer: PrefixWriter | None = None
        if role == KVConnectorRole.SCHEDULER:
            _check_only_engine(vllm_config)
            self.scheduler = PrefixScheduler()
            return
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        parallel = vllm_config.parallel_config
        stacks = stacks_of(cache_layers(kv_cache_config))
        device = _device(vllm_config)
        bank = PrefixBank(
            stacks,
            tp_rank=get_tensor_model_parallel_rank(),
            tp_size=parallel.tensor_parallel_size,
            whole_model=parallel.pipeline_parallel_size == 1,
            dtype=cast(torch.dtype, vllm_config.model_config.dtype),
            device=device,
        )
        # Now rather than in `register_kv_caches`: vLLM calls that inside the memory pool that sleep mode throws away.
        for spec in specs_in(vllm_config.kv_transfer_config).values():
            bank.get(spec)
        self.writer = PrefixWriter(bank, stacks, vllm_config.compilation_config.static_forward_context, device)

    # Scheduler side

    def on_new_request(self, request: Request) -> None:
        assert self.scheduler is not None
        self.scheduler.admit(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        return self.scheduler.num_loadable(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self.scheduler is not None
        return PrefixMetadata(self.scheduler.take_loads())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler is not None
        self.scheduler.finished(request)
        return False, None

    # Worker side

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PrefixMetadata)
        if metadata.loads:
            assert self.writer is not None
            self.writer.write(metadata.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return


def _check_only_engine(vllm_config: VllmConfig) -> None:
    """Raises `PrefixServeError` if the worker in this process, if any, has the connector of another engine.

    vLLM keeps one per process: a second engine would have its prefixes written into the cache of the first.
    """
    if not has_kv_transfer_group():
        return
    theirs, ours = get_kv_transfer_group()._vllm_config.kv_transfer_config, vllm_config.kv_transfer_config
    if theirs is None or ours is None or theirs.engine_id != ours.engine_id:
        raise PrefixServeError(
            "Another engine with a KV connector runs in this process, and vLLM has room for one; shut it down, or leave "
            "VLLM_ENABLE_V1_MULTIPROCESSING on."
        )


def _device(vllm_config: VllmConfig) -> torch.device:
    device = torch.device(cast(torch.device, vllm_config.device_config.device))
    # A worker has made its own device the current one; the config names only the kind.
    return torch.device(device.type, torch.accelerator.current_device_index()) if device.type != "cpu" else device
