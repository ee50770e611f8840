"""The object that picks a prefix in `LLM.generate(..., lora_request=...)`."""

from __future__ import annotations

import os

import msgspec
from vllm.lora.request import LoRARequest

from vllm_plugin.adapters.spec import PrefixSpec


class PrefixAdapterRequest(LoRARequest, omit_defaults=True, array_like=True):
    """Names the prefix adapter that a request runs with, where vLLM takes a `LoRARequest`.

    It travels through vLLM's front end as a LoRA request does, and never reaches its LoRA code: the plugin takes it out
    before the request is validated. The path is for those who run the engine: clients of a server send names only.

    Args:
        lora_name: The name of the adapter.
        lora_int_id: Without a meaning here; it is where `LoRARequest` has it.
        lora_path: Folder or Hub repository, if the adapter is to be loaded under this name when it is not there yet.
        load_inplace: Whether to read the adapter again, from `lora_path` or from where it came, and to put it in the place
            of what has its name. Once per call, however many prompts that has.
        spec: The adapter itself, once the front end has looked it up: a request goes on with it even if the name has
            another meaning, or none, before it reaches the engine.
    """

    lora_int_id: int = 1
    lora_path: str = ""
    base_model_name: str | None = msgspec.field(default=None)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    spec: PrefixSpec | None = None

    def __post_init__(self) -> None:
        # In the place of vLLM's, which insists on a path.
        self.lora_path = os.fspath(self.lora_path or "")

    # vLLM keys its own tables by name; a prefix is never equal to the LoRA of the same name.
    def __eq__(self, value: object) -> bool:
        return isinstance(value, PrefixAdapterRequest) and self.lora_name == value.lora_name

    def __hash__(self) -> int:
        return hash((PrefixAdapterRequest, self.lora_name))
