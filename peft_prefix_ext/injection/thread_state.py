"""The state of the forward pass that a thread runs: several threads may use one model at the same time."""

from __future__ import annotations

import threading

from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.injection.batch import BatchAdapters
from peft_prefix_ext.injection.forward_context import PrefixForwardContext


class ThreadState(threading.local):
    """Attributes that each thread has for itself, at first with the defaults of the class.

    Args:
        context: The forward pass that the thread runs, or ran last.
        batch_adapters: The prefix of each row, where `adapter_names` are given.
        is_bypassed: Whether the thread runs the base model without prefixes.
        offsets: How many virtual tokens precede each row of the current forward pass.
        embeddings_handle: The hook on the embeddings under reentrant gradient checkpointing.
    """

    context: PrefixForwardContext | None = None
    batch_adapters: BatchAdapters | None = None
    is_bypassed = False
    offsets: tuple[int, ...] = ()
    embeddings_handle: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type[ThreadState], tuple[()]]:
        # A copy of the model has no forward pass of its own yet.
        return ThreadState, ()
