"""The object that picks a prefix in `LLM.generate(..., lora_request=...)`."""

from __future__ import annotations

import msgspec
from vllm.lora.request import LoRARequest

from vllm_plugin.config import PrefixSpec


class PrefixAdapterRequest(LoRARequest, omit_defaults=True, array_like=True):
    """Names the prefix adapter that a request runs with, where vLLM takes a `LoRARequest`.

    It travels through vLLM's front end as a LoRA request does, and never reaches its LoRA code: the plugin takes it out
    before the request is validated.

    Args:
        lora_name: The name of the adapter.
        spec: The adapter itself, once the front end has looked it up: a request goes on with it even if the name has
            another meaning, or none, before it reaches the engine.
    """

    lora_int_id: int = 1
    lora_path: str = "prefix-adapter"
    base_model_name: str | None = msgspec.field(default=None)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    spec: PrefixSpec | None = None

    # vLLM keys its own tables by name; a prefix is never equal to the LoRA of the same name.
    def __eq__(self, value: object) -> bool:
        return isinstance(value, PrefixAdapterRequest) and self.lora_name == value.lora_name

    def __hash__(self) -> int:
        return hash((PrefixAdapterRequest, self.lora_name))
