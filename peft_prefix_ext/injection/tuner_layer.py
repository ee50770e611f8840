"""`PrefixTunerLayer`: a PEFT tuner layer that wraps no base layer; `PrefixWeightsLayer`: one with weights of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

if TYPE_CHECKING:
    from peft_prefix_ext.injection.decoder_hook import PrefixDecoderHook


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


class PrefixWeightsLayer(PrefixTunerLayer):
    """A tuner layer that holds what one module of the model starts from.

    Args:
        device: The device of that module.
        module_name: The name of that module in the model.
        index: Its layer index.
        decoder_hook: The hook on the decoder, which all layers share.
    """

    def __init__(self, device: torch.device, module_name: str, index: int, decoder_hook: PrefixDecoderHook) -> None:
        super().__init__(device)
        self.module_name = module_name
        self.index = index
        self.awaiting_weights: set[str] = set()
        self._decoder_hook = (decoder_hook,)  # in a tuple, so as not to become a submodule of every layer

    @property
    def decoder_hook(self) -> PrefixDecoderHook:
        return self._decoder_hook[0]

    def has_reparam(self, adapter_name: str) -> bool:
        """Whether the weights of an adapter are not those on disk."""
        return adapter_name in self.decoder_hook.prefix_ext_reparam

    def check_loaded(self, adapter_name: str, weight: torch.Tensor) -> None:
        """Checks that the weights of an adapter whose config is that of a saved one were loaded.

        `load_state_dict` sets them in the form that they have here. transformers' own loading sets tensor by tensor and
        knows the form on disk, where the output of a reparameterization is part of the K/V. Compiled graphs skip the check.

        Raises:
            ValueError: If they were not, or cannot be loaded in this way.
        """
        if adapter_name not in self.awaiting_weights or torch.compiler.is_compiling():
            return
        if weight.is_meta or weight.isnan().all():
            raise ValueError(
                f"Adapter {adapter_name!r} was made from the config of a saved adapter, but its weights were never loaded; "
                "use `PeftModel.from_pretrained` or `load_adapter`, or a fresh `PrefixExtConfig` to train anew."
            )
        if self.has_reparam(adapter_name):
            raise ValueError(
                f"Adapter {adapter_name!r} has a reparameterization, which transformers cannot load to continue training; "
                "use `PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        self.awaiting_weights.discard(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        container = self.adapter_layer_names[0]
        self.awaiting_weights -= {name for name in self.awaiting_weights if f"{prefix}{container}.{name}" in state_dict}

    def copy_adapter_from(self, adapter_name: str, source_adapter: str) -> None:
        super().copy_adapter_from(adapter_name, source_adapter)
        if source_adapter not in self.awaiting_weights:
            self.awaiting_weights.discard(adapter_name)

    def drop_adapter(self, adapter_name: str) -> None:
        super().drop_adapter(adapter_name)
        self.awaiting_weights.discard(adapter_name)
