"""The KV connector that loads prefixes into vLLM's paged cache: a thin layer over `scheduler/` and `worker/`.

Loads are synchronous: the scheduler counts the virtual tokens as computed, and the worker writes them before the
forward pass of the same step. vLLM registers the blocks as cached while it schedules that step, so a second request of
the step finds them, and it reads them after the write as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_plugin.adapters.cache_layout import cache_layout
from vllm_plugin.adapters.remote import use_cache
from vllm_plugin.adapters.speculation import draft_model
from vllm_plugin.adapters.validation import publishes_events
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import CACHE_SIZE, DEFAULT_DEVICE_MEMORY, DEVICE_MEMORY, HANDOVER
from vllm_plugin.metadata import PrefixMetadata
from vllm_plugin.metrics import PrefixPromMetrics, PrefixStats
from vllm_plugin.patches.install import require
from vllm_plugin.scheduler.pinned_prefixes import PinnedPrefixes
from vllm_plugin.scheduler.scheduler import PrefixScheduler
from vllm_plugin.worker.cache_layers import CacheLayer, cache_layers, stacks_of
from vllm_plugin.worker.cache_writer import PrefixWriter
from vllm_plugin.worker.draft_layers import draft_layer_names, draft_loads, share_memory
from vllm_plugin.worker.prefix_manager import PrefixManager
from vllm_plugin.worker.published_layers import check_and_publish
from vllm_plugin.worker.state_layers import state_layers
from vllm_plugin.worker.state_writer import StateWriter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads trained prefixes into the KV cache."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        # An engine in a process of its own does not create its config there.
        require(server=False, kv_events=publishes_events(vllm_config))
        self.scheduler: PrefixScheduler | None = None
        self.writer: PrefixWriter | None = None
        # Of prefixes that were trained on the draft model, if the engine has one.
        self.draft_writer: PrefixWriter | None = None
        if role == KVConnectorRole.SCHEDULER:
            _check_only_engine(vllm_config)
            self.scheduler = PrefixScheduler(
                _block_size(kv_cache_config),
                hands_over=self._kv_transfer_config.get_from_extra_config(HANDOVER, False),
            )
            return
        use_cache(self._kv_transfer_config.get_from_extra_config(CACHE_SIZE, None))
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        tp_rank, tp_size = get_tensor_model_parallel_rank(), vllm_config.parallel_config.tensor_parallel_size
        dtype, device = cast(torch.dtype, vllm_config.model_config.dtype), _device(vllm_config)
        modules = vllm_config.compilation_config.static_forward_context
        names = {name for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
        draft_names = draft_layer_names(vllm_config, kv_cache_config, modules)
        model = vllm_config.model_config
        layers = cache_layers(kv_cache_config, cache_layout(model), leave_out=draft_names)
        recurrent = state_layers(
            kv_cache_config, modules, model.hf_text_config.num_hidden_layers, leave_out=draft_names
        )
        check_and_publish(vllm_config, layers, recurrent, tp_rank)
        draft_layers: list[CacheLayer] = []
        if (draft := draft_model(vllm_config)) is not None:
            draft_layers = cache_layers(kv_cache_config, cache_layout(draft), leave_out=names - draft_names)
        device_memory, draft_memory = share_memory(
            self._kv_transfer_config.get_from_extra_config(DEVICE_MEMORY, DEFAULT_DEVICE_MEMORY), layers, draft_layers
        )
        manager = PrefixManager(
            stacks_of(layers),
            tp_rank=tp_rank,
            tp_size=tp_size,
            dtype=dtype,
            device=device,
            device_memory=device_memory,
            state_layers=recurrent,
        )
        states = StateWriter(recurrent, modules, device) if recurrent else None
        self.writer = PrefixWriter(manager, modules, states)
        if draft_layers:
            assert vllm_config.speculative_config is not None
            draft_tp_size = vllm_config.speculative_config.draft_parallel_config.tensor_parallel_size
            draft_manager = PrefixManager(
                stacks_of(draft_layers),
                # A draft model that is not split is whole on each rank.
                tp_rank=tp_rank if draft_tp_size > 1 else 0,
                tp_size=draft_tp_size,
                dtype=dtype,
                device=device,
                device_memory=draft_memory,
                without="fewer drafts of its requests are accepted",
            )
            self.draft_writer = PrefixWriter(draft_manager, modules)

    # Scheduler side

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self.scheduler is not None
        self.scheduler.pinned = PinnedPrefixes.of_engine(self._vllm_config, self._kv_cache_config, kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        assert self.scheduler is not None
        self.scheduler.add_placeholders(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        if self.scheduler.pinned:
            self.scheduler.pinned.blocks.before_request(request.num_tokens - num_computed_tokens)
        num_loadable = self.scheduler.num_loadable(request, num_computed_tokens)
        if num_loadable:
            self.scheduler.accept_load(request)
        return num_loadable, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        self.scheduler.allocated(request, blocks.get_block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self.scheduler is not None
        loads, pinned = self.scheduler.take_loads(), self.scheduler.pinned
        self.scheduler.end_step()
        # Workers make room only for loads.
        return PrefixMetadata(loads, pinned.take_digests() if loads and pinned is not None else None)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler is not None
        return False, self.scheduler.finished(request, block_ids)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self.scheduler is not None
        self.scheduler.other_connectors.update()
        # vLLM evicts blocks of running requests only. Requests that were aborted or preempted meanwhile left some as
        # well.
        if connector_output.invalid_block_ids and self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(
                self.scheduler.recent_blocks.expand_to_requests(connector_output.invalid_block_ids)
            )

    def take_events(self) -> Iterable[KVCacheEvent]:
        # At the end of each step, when the blocks of requests that have ended are free again.
        if self.scheduler is not None and self.scheduler.pinned:
            self.scheduler.pinned.next_step()
        return ()

    def reset_cache(self) -> bool | None:
        assert self.scheduler is not None
        self.scheduler.other_connectors.were_reset()
        return True

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        # That of another connector: vLLM hands it to all of them. The base class refuses several pipeline stages.
        return

    # Worker side

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PrefixMetadata)
        if metadata.loads:
            assert self.writer is not None
            if metadata.pinned is not None:
                self._pin(metadata.pinned)
            self.writer.write(metadata.loads)
            if self.draft_writer is not None and (loads := draft_loads(metadata.loads)):
                self.draft_writer.write(loads)
                # Drafts without a prefix are rejected, not wrong: their requests go on.
                self.draft_writer.take_unwritten()
                # Adapters are counted by their own prefix.
                self.draft_writer.stats.reset()

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self.writer is not None
        return self.writer.take_unwritten()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def _pin(self, digests: frozenset[str]) -> None:
        for writer in (self.writer, self.draft_writer):
            if writer is not None:
                writer.pin(digests)

    def release_device_memory(self) -> None:
        """Drops the prefixes on the device, before the engine sleeps."""
        for writer in (self.writer, self.draft_writer):
            if writer is not None:
                writer.release_device_memory()

    def unregister_kv_caches(self) -> None:
        """vLLM 0.33 calls it before the engine sleeps, and when it drops its KV cache."""
        self.release_device_memory()

    def restore_kv_caches(self) -> None:
        """vLLM 0.33 calls it after the engine woke up. The KV cache is empty then.

        Each prefix comes back from the host with its next load. The layers' caches are looked up for each load.
        """
        return

    # Both sides

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.scheduler is not None:
            return self.scheduler.stats.take()
        assert self.writer is not None
        return self.writer.stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return PrefixStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return PrefixPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _check_only_engine(vllm_config: VllmConfig) -> None:
    """Raises `PrefixServeError` if another engine has its connector in this process.

    vLLM keeps one connector per process, so prefixes of a second engine would be written into the cache of the first.
    """
    if not has_kv_transfer_group():
        return
    theirs, ours = get_kv_transfer_group()._vllm_config.kv_transfer_config, vllm_config.kv_transfer_config
    if theirs is None or ours is None or theirs.engine_id != ours.engine_id:
        raise PrefixServeError(
            "Another engine with a KV connector runs in this process, and vLLM supports only one; shut it down, or leave "
            "VLLM_ENABLE_V1_MULTIPROCESSING on."
        )


def _block_size(kv_cache_config: KVCacheConfig) -> int:
    return math.lcm(*(group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups))


def _device(vllm_config: VllmConfig) -> torch.device:
    device = torch.device(cast(torch.device, vllm_config.device_config.device))
    # The config names only the type of device. The worker has made its own device the current one.
    return torch.device(device.type, torch.accelerator.current_device_index()) if device.type != "cpu" else device
