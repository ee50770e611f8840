"""What belongs to the forward pass that one thread runs, since several threads may use one model."""

from __future__ import annotations

import threading

from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.forward_context import PrefixForwardContext


class ThreadState(threading.local):
    """Each thread has values of its own, at first those of the class.

    Args:
        step: The forward pass under way, or the last one.
        mixed: The prefixes of its batches where each row has its own.
        is_bypassed: Whether it runs the base model alone.
        offsets: How many virtual tokens stand before each row of the forward pass under way.
        embeddings_handle: The hook that a forward pass under reentrant gradient checkpointing needs.
    """

    step: PrefixForwardContext | None = None
    mixed: BatchAdapters | None = None
    is_bypassed = False
    offsets: tuple[int, ...] = ()
    embeddings_handle: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type[ThreadState], tuple[()]]:
        # A copy of the model has no forward pass under way.
        return ThreadState, ()
