"""What PEFT expects of a tuner layer and a layer that wraps none has to say itself."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class PrefixTunerLayer(nn.Module, BaseTunerLayer):
    """A tuner layer that stands beside base layers instead of around one.

    Args:
        device: Where the part of the model is that it belongs to.
    """

    cast_input_dtype_enabled = True  # what `disable_input_dtype_casting` turns off and on again in every tuner layer

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def get_base_layer(self) -> nn.Module:
        # Without this, PEFT's `weight` property looks for the weight of the wrapped layer in this layer, without end.
        raise AttributeError("A prefix wraps no layer.")

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # transformers calls each layer, with names of adapters of other types among them.
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self._all_available_adapter_names()]
        if len(own) > 1:
            raise ValueError(f"PREFIX_EXT has one active adapter at a time, got {own}.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def forget(self, adapter_name: str) -> None:
        """Drops an adapter that is about to be made anew."""
        for name in self.adapter_layer_names + self.other_param_names:
            states = getattr(self, name)
            if adapter_name in states:
                del states[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)

    @torch.no_grad()
    def copy_adapter_from(self, adapter_name: str, source_adapter: str) -> None:
        """Gives an adapter the weights of another one of the same config."""
        for name in self.adapter_layer_names + self.other_param_names:
            states = getattr(self, name)
            if isinstance(states, nn.ModuleDict):
                if source_adapter in states:
                    states[adapter_name].load_state_dict(states[source_adapter].state_dict())
            elif source_adapter in states:
                states[adapter_name].copy_(states[source_adapter])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for name in self.adapter_layer_names + self.other_param_names:
            states = getattr(self, name)
            if adapter_name in states:
                states[adapter_name] = states[adapter_name].to(device or self.device)
