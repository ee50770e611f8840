"""Tensor-parallel models (transformers' `tp_plan`), whose attention heads are sharded over processes.

Every process holds the whole prefix, so that all train the same parameters and save the same file, which loads on any
number of processes. In the forward pass, each attention module gets the prefix of its local heads. Dropout of the
prefix needs the same seed on all processes, as anything random in such a model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from peft_prefix_ext.checkpoint.format import LayerKV


@dataclass(frozen=True)
class ShardedHeads:
    """How the K/V heads of an attention module are sharded.

    Args:
        mesh: The processes, in one dimension.
        has_own_kv: Whether each process has K/V heads of its own. Otherwise all have the same K/V heads, for different
            query heads.
    """

    mesh: DeviceMesh
    has_own_kv: bool

    def local(self, full: torch.Tensor) -> torch.Tensor:
        """Returns the local heads, `[num_local_heads, p, head_dim]`, of a K or V of all heads."""
        return _LocalHeads.apply(full, self)


class _LocalHeads(torch.autograd.Function):
    """Selects the local heads; the backward pass gathers the gradient of all heads."""

    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, heads: ShardedHeads) -> torch.Tensor:
        ctx.heads = heads
        if not heads.has_own_kv:
            return full.view_as(full)
        return full.chunk(heads.mesh.size())[heads.mesh.get_local_rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.heads.has_own_kv:
            return torch.cat(_all_gather(gradient, ctx.heads.mesh)), None
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.heads.mesh.get_group())
        return gradient, None


def tensor_parallel_mesh(model: nn.Module) -> DeviceMesh | None:
    """Returns the mesh that the heads of `model` are sharded over, in one dimension; `None` for a model in one process."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh: Any = model._device_mesh
    return mesh if mesh.ndim == 1 else mesh["tp"]


def gather_heads(attention: nn.Module, local: LayerKV, mesh: DeviceMesh) -> tuple[LayerKV, ShardedHeads | None]:
    """Returns the K/V of all heads of an attention module, and how they are sharded; `None` if they are not.

    Args:
        attention: The attention module.
        local: The K/V of the local heads, `[num_local_heads, num_tokens, head_dim]` each.
        mesh: The processes.
    """
    if not any(
        isinstance(weight, DTensor) and not weight.placements[-1].is_replicate() for weight in attention.parameters()
    ):
        return local, None
    keys, values = (_all_gather(tensor, mesh) for tensor in local)
    # Different heads have different K/V for the same token; those of equal heads may differ by rounding.
    has_own_kv = not all(
        torch.allclose(part, parts[0], rtol=1e-3, atol=1e-3) for parts in (keys, values) for part in parts
    )
    kv = LayerKV(torch.cat(keys), torch.cat(values)) if has_own_kv else local
    return kv, ShardedHeads(mesh, has_own_kv)


@torch.no_grad()
def broadcast_to_tensor_parallel(model: nn.Module, *tensors: torch.Tensor) -> None:
    """Overwrites `tensors` with those of the first process that holds a part of `model`."""
    if (mesh := tensor_parallel_mesh(model)) is not None:
        broadcast_from_first_rank(mesh.get_group(), *tensors)


@torch.no_grad()
def broadcast_from_first_rank(group: dist.ProcessGroup, *tensors: torch.Tensor) -> None:
    """Overwrites `tensors` with those of the first process of a group; all its processes must call this."""
    for tensor in tensors:
        buffer = tensor.contiguous()
        dist.broadcast(buffer, dist.get_global_rank(group, 0), group=group)
        tensor.copy_(buffer)


def _all_gather(tensor: torch.Tensor, mesh: DeviceMesh) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(parts, tensor.contiguous(), group=mesh.get_group())
    return parts
