"""The layers of a worker, published for adapters that are loaded later, once the adapters so far are checked against them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from vllm_plugin.adapters.cache_layout import total_num_kv_heads
from vllm_plugin.adapters.registry import registry_in
from vllm_plugin.adapters.startup_log import log_adapters, log_cache
from vllm_plugin.adapters.validation import check_shapes, check_states
from vllm_plugin.worker.cache_layers import CacheLayer, model_shapes
from vllm_plugin.worker.state_layers import StateLayer, model_states

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_and_publish(
    vllm_config: VllmConfig, layers: Sequence[CacheLayer], recurrent: Sequence[StateLayer], tp_rank: int
) -> None:
    """Checks the adapters against a worker's layers, and publishes the layers for adapters that are loaded later.

    Raises:
        PrefixServeError: If an adapter does not fit this model.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    try:
        registry = registry_in(vllm_config.kv_transfer_config)
    except FileNotFoundError:
        # This worker runs on another machine than the server. The workers on the server's machine check the adapters.
        return
    assert registry is not None
    shapes = model_shapes(layers, parallel.tensor_parallel_size, total_num_kv_heads(model))
    states = model_states(recurrent)
    adapters, whole_model = registry.adapters(), parallel.pipeline_parallel_size == 1
    for adapter in adapters:
        check_shapes(adapter.spec.name, adapter.shapes, shapes, whole_model)
        check_states(adapter.spec.name, adapter.states, states, whole_model)
    if tp_rank == 0:
        block_size = math.lcm(*(layer.block_size for layer in layers))
        registry.add_layers(shapes, block_size, states)
        # One worker of the first pipeline stage logs for all.
        if parallel.data_parallel_index == 0 and shapes[0][0] == 0:
            log_cache(block_size, is_hybrid=bool(states))
            log_adapters(adapters, block_size, cast(torch.dtype, model.dtype).itemsize)
