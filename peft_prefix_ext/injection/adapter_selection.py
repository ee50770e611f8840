"""Which prefix each row of the next forward pass has: that of the active adapter, or of `adapter_names`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.utils.hooks import RemovableHandle

from peft_prefix_ext.injection.batch import BASE_ADAPTER, BatchAdapters
from peft_prefix_ext.injection.thread_state import ThreadState
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

# Two threads may be the first to pass adapter names to a module; only one of them registers the hook.
_REGISTERING = threading.Lock()


class AdapterSelection(PrefixTunerLayer):
    """The adapters of a decoder, and those that each thread selects for its forward passes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.num_virtual_tokens: dict[str, int] = {}
        self._thread_state = ThreadState()
        self._modules_with_names: list[AuxiliaryTrainingWrapper] = []
        self._handles: list[RemovableHandle] = []

    def add_handle(self, handle: RemovableHandle) -> None:
        """Adds a hook that `detach` removes too."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()

    @property
    def batch_adapters(self) -> BatchAdapters | None:
        """The prefixes of this thread's next forward pass; `None` if it has none."""
        active = self.active_adapters  # read once: another thread may set it
        if self._thread_state.is_bypassed or self.disable_adapters or not active:
            return None
        if self._thread_state.batch_adapters is not None:
            return self._thread_state.batch_adapters
        # An encoder may have no prefix, and adapters of other types may be active too.
        name = next((name for name in active if name in self.num_virtual_tokens), None)
        return None if name is None else BatchAdapters((name,), self.num_virtual_tokens[name])

    @contextmanager
    def use_batch_adapters(self, batch: BatchAdapters) -> Iterator[None]:
        """Gives the rows of this thread's batches these prefixes, whichever adapter is active."""
        self._thread_state.batch_adapters = batch
        try:
            yield
        finally:
            self._thread_state.batch_adapters = None

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Runs the base model without prefixes in this thread; `requires_grad` of parameters stays as it is."""
        before, self._thread_state.is_bypassed = self._thread_state.is_bypassed, True
        try:
            yield
        finally:
            self._thread_state.is_bypassed = before

    def pass_adapter_names_to(self, wrapper: AuxiliaryTrainingWrapper) -> None:
        """Passes `adapter_names` to a module that is saved with adapters, such as a head."""
        with _REGISTERING:
            if wrapper not in self._modules_with_names:
                self._modules_with_names.append(wrapper)
                self._handles.append(wrapper.register_forward_pre_hook(self._before_wrapper, with_kwargs=True))

    def _before_wrapper(
        self, wrapper: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        batch = self.batch_adapters
        if batch is None or not batch.names:
            return None
        names = batch.expand_to(len(args[0])).names
        known = [name if name in wrapper._adapters else BASE_ADAPTER for name in names]
        return args, {**kwargs, "adapter_names": known}

    def delete_adapter(self, adapter_name: str) -> None:
        self.drop_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT chooses the next active adapter among them; those without a reparameterization count too.
        return sorted(self.num_virtual_tokens)

    def drop_adapter(self, adapter_name: str) -> None:
        super().drop_adapter(adapter_name)
        self.num_virtual_tokens.pop(adapter_name, None)
