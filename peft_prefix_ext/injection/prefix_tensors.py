"""`PrefixTensors`: the K or the V of an attention layer's prefixes, by adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate


class PrefixTensors(nn.ParameterDict):
    """Tensors by adapter: parameters if they train, and persistent buffers if they are frozen.

    Checkpoints of trainable parameters only, as DeepSpeed and Lightning write them, include buffers. Without the K/V that
    an MLP is added to, the trained MLP would be useless.

    Args:
        attention: The attention module, whose parameters show how the model is sharded.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple, so as not to become a submodule

    def register_frozen(self, adapter_name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor that does not train."""
        self._keys[adapter_name] = None
        self.register_buffer(adapter_name, tensor)

    def __setitem__(self, adapter_name: str, tensor: Any) -> None:
        # PEFT assigns a parameter when it moves or casts an adapter.
        if adapter_name in self._buffers:
            self._buffers[adapter_name] = tensor.detach()
        else:
            super().__setitem__(adapter_name, tensor)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves buffers as DTensors in a sharded model on "meta": FSDP2 does not shard buffers, but accelerate fills DTensors only."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        meshes = [weight.device_mesh for weight in self._attention[0].parameters() if isinstance(weight, DTensor)]
        for name, tensor in self._buffers.items():
            if meshes and tensor is not None and tensor.is_meta:
                replicated = [Replicate()] * meshes[0].ndim
                destination[prefix + name] = DTensor.from_local(tensor, meshes[0], replicated, run_check=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._buffers:
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, DTensor):
                state_dict[prefix + name] = tensor.full_tensor()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
