"""Models whose attention heads are spread over processes (transformers' `tp_plan`): each process keeps the whole prefix.

So all hold the same parameters, take the same steps, and save the same file, which loads anywhere. In the forward pass an
attention sees the heads of its own process. As with all that is random in such a model, dropout needs one seed for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from peft_prefix_ext.checkpoint.format import LayerKV

if TYPE_CHECKING:
    from peft_prefix_ext.base_model.layers import ProbedLayer


@dataclass(frozen=True)
class SpreadHeads:
    """How the heads of an attention are spread.

    Args:
        mesh: The processes, in one dimension.
        has_own_kv: Whether each has K/V heads of its own; else all have the same, each for other queries.
    """

    mesh: DeviceMesh
    has_own_kv: bool

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Returns the K or V of this process' heads, `[num_own_heads, p, head_dim]`, of those of all."""
        return _OwnHeads.apply(whole, self)


class _OwnHeads(torch.autograd.Function):
    """Each process learns the gradient of its own heads; afterwards all know that of all."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, heads: SpreadHeads) -> torch.Tensor:
        ctx.heads = heads
        if not heads.has_own_kv:
            return whole.view_as(whole)
        return whole.chunk(heads.mesh.size())[heads.mesh.get_local_rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.heads.has_own_kv:
            return torch.cat(_gather(gradient, ctx.heads.mesh)), None
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.heads.mesh.get_group())
        return gradient, None


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Returns the processes that the heads of `model` are spread over, in one dimension; `None` where there is but one."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh: Any = model._device_mesh
    return mesh if mesh.ndim == 1 else mesh["tp"]


def with_all_heads(model: nn.Module, layers: list[ProbedLayer]) -> list[ProbedLayer]:
    """Returns `layers` with the K/V of all processes' heads."""
    mesh = mesh_of(model)
    return (
        layers
        if mesh is None
        else [_with_all_heads(model.get_submodule(layer.module), layer, mesh) for layer in layers]
    )


def _with_all_heads(attention: nn.Module, layer: ProbedLayer, mesh: DeviceMesh) -> ProbedLayer:
    if not any(
        isinstance(weight, DTensor) and not weight.placements[-1].is_replicate() for weight in attention.parameters()
    ):
        return layer
    parts = [_gather(state, mesh) for state in layer.kv]
    # Other heads say something else of the same token; equal ones may differ by rounding.
    has_own_kv = not all(
        torch.allclose(part, of_kind[0], rtol=1e-3, atol=1e-3) for of_kind in parts for part in of_kind
    )
    kv = LayerKV(*(torch.cat(of_kind) for of_kind in parts)) if has_own_kv else layer.kv
    return replace(layer, kv=kv, heads=SpreadHeads(mesh, has_own_kv))


@torch.no_grad()
def share(model: nn.Module, *tensors: torch.Tensor) -> None:
    """Gives all processes that hold a part of `model` the first one's `tensors`, in place."""
    if (mesh := mesh_of(model)) is not None:
        copy_from_first(mesh.get_group(), *tensors)


@torch.no_grad()
def copy_from_first(group: dist.ProcessGroup, *tensors: torch.Tensor) -> None:
    """Gives all processes of a group the first one's `tensors`, in place; all must call it."""
    for tensor in tensors:
        same = tensor.contiguous()
        dist.broadcast(same, dist.get_global_rank(group, 0), group=group)
        tensor.copy_(same)


def _gather(state: torch.Tensor, mesh: DeviceMesh) -> list[torch.Tensor]:
    parts = [torch.empty_like(state, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(parts, state.contiguous(), group=mesh.get_group())
    return parts
