"""vLLM's offloading connector on CPU: vLLM's code except for the copies, which it supports only on GPUs."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "HostOffloadingSpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 2**26,
    },
}


class HostWorker(OffloadingWorker):
    """Copies blocks of the KV cache one at a time and synchronously.

    Args:
        caches: The KV cache, a row per block.
        num_chunks: The number of blocks that it can store.
    """

    def __init__(self, caches: CanonicalKVCaches, num_chunks: int) -> None:
        # The tensors of each KV cache group. Groups may share tensors, but use different blocks.
        self._groups = [[ref.tensor_idx for ref in group] for group in caches.group_data_refs]
        self._cache = [entry.tensor for entry in caches.tensors]
        self._kept = [torch.empty(num_chunks, tensor.shape[1], dtype=torch.int8) for tensor in self._cache]
        self._done: list[TransferResult] = []
        self.num_stored = self.num_loaded = 0

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.num_stored += self._copy(job_id, src_spec.group_sizes, self._cache, src_spec, self._kept, dst_spec)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.num_loaded += self._copy(job_id, dst_spec.group_sizes, self._kept, src_spec, self._cache, dst_spec)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        return

    def _copy(self, job_id: int, sizes: Any, source: Any, source_spec: Any, target: Any, target_spec: Any) -> int:
        """Copies the blocks of one job, which are sorted by group, and returns their number."""
        pairs = zip(source_spec.block_ids.tolist(), target_spec.block_ids.tolist(), strict=True)
        for tensor_ids, size in zip(self._groups, sizes, strict=True):
            for from_block, to_block in islice(pairs, size):
                for index in tensor_ids:
                    target[index][to_block].copy_(source[index][from_block])
        self._done.append(TransferResult(job_id, success=True))
        return len(source_spec.block_ids)


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's offloading, with its bookkeeping, on CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = HostWorker(kv_caches, self.num_chunks)
        return self._worker
