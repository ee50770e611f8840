"""The tensors of an attention layer's prefixes, by adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate


class PrefixTensors(nn.ParameterDict):
    """Tensors by adapter: parameters where they train, and persistent buffers where they stay as they are.

    A checkpoint of trainable parameters alone, as DeepSpeed and Lightning write, keeps the buffers of a model, too: without
    what it adds to, what was trained is worth nothing.

    Args:
        attention: The attention module, which tells how the model is sharded.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple, so as not to become a submodule

    def keep(self, adapter_name: str, state: torch.Tensor) -> None:
        """Adds a tensor that does not train."""
        self._keys[adapter_name] = None
        self.register_buffer(adapter_name, state)

    def __setitem__(self, adapter_name: str, state: Any) -> None:
        # As when PEFT moves or casts an adapter.
        if adapter_name in self._buffers:
            self._buffers[adapter_name] = state.detach()
        else:
            super().__setitem__(adapter_name, state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Sharding (FSDP2) leaves buffers alone, but accelerate, which shards on "meta", then fills in DTensors only."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        meshes = [weight.device_mesh for weight in self._attention[0].parameters() if isinstance(weight, DTensor)]
        for name, state in self._buffers.items():
            if meshes and state is not None and state.is_meta:
                whole = [Replicate()] * meshes[0].ndim
                destination[prefix + name] = DTensor.from_local(state, meshes[0], whole, run_check=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._buffers:
            state = state_dict.get(prefix + name)
            if isinstance(state, DTensor):
                state_dict[prefix + name] = state.full_tensor()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
