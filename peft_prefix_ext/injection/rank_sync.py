"""Processes that train one prefix start from the same one.

What trains is a parameter, which DDP, FSDP and DeepSpeed make the same in all processes; what an MLP adds to is a buffer, which
of these DDP alone does. Drawn at random in processes of different seeds, each would add to something else, and say so to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from peft_prefix_ext.base_model.tensor_parallel import copy_from_first
from peft_prefix_ext.injection.prefix_tensors import PrefixTensors


@torch.no_grad()
def start_as_first_process(decoder: nn.Module, adapter_name: str) -> None:
    """Gives an adapter, before its first step of training, the first process' tensors that do not train.

    Where FSDP or DeepSpeed trains the model, whose forward passes all processes run together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    kept = [
        states[adapter_name]
        for states in decoder.modules()
        if isinstance(states, PrefixTensors) and adapter_name in states._buffers
    ]
    for group in dict.fromkeys(_groups(decoder)):
        copy_from_first(group, *(state for state in kept if not state.is_meta))


def _groups(decoder: nn.Module) -> Iterator[Any]:
    """Yields the groups of processes between which the parameters of a decoder are spread, or their optimizer's state."""
    for module in decoder.modules():
        if isinstance(module, FullyShardedDataParallel):
            yield module.process_group
    for parameter in decoder.parameters():
        if isinstance(parameter, DTensor):
            yield from parameter.device_mesh.get_all_groups()
        # DeepSpeed's, of ZeRO-1 and ZeRO-2, and of ZeRO-3.
        for attribute in ("_dp_group", "ds_process_group"):
            if (group := getattr(parameter, attribute, None)) is not None:
                yield group
