"""Processes that train one prefix together start from the same tensors.

DDP, FSDP and DeepSpeed synchronize parameters. The K/V that an MLP is added to are buffers, which only DDP
synchronizes. If they were drawn at random under different seeds, each process would silently train another prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from peft_prefix_ext.base_model.tensor_parallel import broadcast_from_first_rank
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors


@torch.no_grad()
def broadcast_frozen_tensors(decoder: nn.Module, adapter_name: str) -> None:
    """Overwrites the tensors of an adapter that do not train with those of the first process.

    To be called in the first forward pass in training, which all processes run together. Does nothing unless FSDP or
    DeepSpeed trains the model.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    frozen = [
        tensors[adapter_name]
        for tensors in decoder.modules()
        if isinstance(tensors, PrefixTensors) and adapter_name in tensors._buffers
    ]
    for group in dict.fromkeys(_process_groups(decoder)):
        broadcast_from_first_rank(group, *(tensor for tensor in frozen if not tensor.is_meta))


def _process_groups(decoder: nn.Module) -> Iterator[Any]:
    """Yields the groups of processes that the parameters of a decoder, or their optimizer states, are sharded over."""
    for module in decoder.modules():
        if isinstance(module, FullyShardedDataParallel):
            yield module.process_group
    for parameter in decoder.parameters():
        if isinstance(parameter, DTensor):
            yield from parameter.device_mesh.get_all_groups()
        # DeepSpeed: ZeRO-1 and ZeRO-2, then ZeRO-3.
        for attribute in ("_dp_group", "ds_process_group"):
            if (group := getattr(parameter, attribute, None)) is not None:
                yield group
