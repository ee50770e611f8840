"""The memory of a training step, exact: on a CPU it is counted from the profiler's log of every allocation.

Memory that was allocated before the step, such as weights and optimizer state, does not count.
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
    """Runs a training step and counts its memory.

    Args:
        forward: Returns the loss.
        update: Takes the loss and does the rest of the step.
        device: The device whose memory counts.

    Returns:
        Bytes: `saved`, kept between the forward and the backward pass, and `peak`, the maximum during the step.
    """
    gc.disable()  # reference cycles of an earlier step must not be freed in this one
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
