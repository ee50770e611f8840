"""Copies from the host to the device that nothing waits for.

A plain copy waits until the device has done all that was asked of it before, which with async scheduling is the step
before this one. vLLM's own copy goes through pinned memory instead, and runs on the current stream. That is the stream
of the forward pass, so what a step loads is there when the step reads it, and no events are needed. torch reuses the
memory of a tensor, pinned or on the device, only after such copies out of it or writes into it have run.
"""

from __future__ import annotations

import torch
from vllm.utils.torch_utils import async_tensor_h2d


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on the device; one that is there already stays as it is.

    Args:
        tensor: On the host, or on the device.
        device: The device of the KV cache; the host itself on a CPU.

    Raises:
        torch.OutOfMemoryError: If the device has no room for it.
    """
    if tensor.device.type == device.type:
        return tensor
    try:
        return async_tensor_h2d(tensor, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # The host has no memory that could be pinned. A copy that waits is better than an engine that ends.
        return tensor.to(device)
