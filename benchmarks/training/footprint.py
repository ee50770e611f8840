"""The memory of a training step, counted and not sampled: on a CPU from the profiler's log of every allocation.

Both numbers are of what lies there beside the weights, the optimizer's state and whatever else was there before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Footprint = dict[str, int]
_UPDATE = "footprint: update"


def footprint(
    forward: Callable[[], torch.Tensor], update: Callable[[torch.Tensor], None], device: torch.device
) -> Footprint:
    """Runs a training step.

    Args:
        forward: Returns the loss.
        update: The rest of the step, given the loss.
        device: Whose memory is counted.

    Returns:
        In bytes: `saved`, what is there between the forward and the backward pass, and `peak`, the most there ever is.
    """
    gc.disable()  # what an earlier step left in cycles must not be freed in this one
    try:
        return _on_cuda(forward, update, device) if device.type == "cuda" else _on_cpu(forward, update)
    finally:
        gc.enable()


def _on_cuda(
    forward: Callable[[], torch.Tensor], update: Callable[[torch.Tensor], None], device: torch.device
) -> Footprint:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = forward()
    saved = torch.cuda.memory_allocated(device) - before
    update(loss)
    return {"saved": saved, "peak": torch.cuda.max_memory_allocated(device) - before}


def _on_cpu(forward: Callable[[], torch.Tensor], update: Callable[[torch.Tensor], None]) -> Footprint:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
        with record_function(_UPDATE):
            update(loss)
    events = profiler.profiler.kineto_results.events()
    middle = next(event.start_ns() for event in events if event.name() == _UPDATE)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    saved = sum(size for time, size in changes if time < middle)
    return {"saved": saved, "peak": max(accumulate(size for _, size in changes))}
