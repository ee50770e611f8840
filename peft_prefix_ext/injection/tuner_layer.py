"""`PrefixTunerLayer`: a PEFT tuner layer that wraps no base layer."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class PrefixTunerLayer(nn.Module, BaseTunerLayer):
    """A tuner layer that is a child of a base module, instead of a wrapper around one.

    Args:
        device: The device of that module.
    """

    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it on every tuner layer

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def get_base_layer(self) -> nn.Module:
        # PEFT's own looks for the wrapped layer in this layer, without end.
        raise AttributeError("A prefix wraps no layer.")

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # transformers calls each layer with the names of all adapters, also of other types.
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self._all_available_adapter_names()]
        if len(own) > 1:
            raise ValueError(f"PREFIX_EXT has one active adapter at a time, got {own}.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def drop_adapter(self, adapter_name: str) -> None:
        """Removes what the layer holds of an adapter, without choosing another active one."""
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if adapter_name in container:
                del container[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)

    @torch.no_grad()
    def copy_adapter_from(self, adapter_name: str, source_adapter: str) -> None:
        """Overwrites the weights of an adapter with those of another one of the same config."""
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if isinstance(container, nn.ModuleDict):
                if source_adapter in container:
                    container[adapter_name].load_state_dict(container[source_adapter].state_dict())
            elif source_adapter in container:
                container[adapter_name].copy_(container[source_adapter])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if adapter_name in container:
                container[adapter_name] = container[adapter_name].to(device or self.device)
