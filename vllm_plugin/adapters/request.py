"""The object that selects a prefix in `LLM.generate(..., lora_request=...)`."""

from __future__ import annotations

import os

import msgspec
from vllm.lora.request import LoRARequest

from vllm_plugin.adapters.spec import PrefixSpec


class PrefixAdapterRequest(LoRARequest, omit_defaults=True, array_like=True):
    """Names the prefix adapter of a request, wherever vLLM takes a `LoRARequest`.

    It passes through vLLM's front end like a LoRA request, but never reaches its LoRA code: the plugin takes it out
    before vLLM validates the request. Only the caller of the engine sets a path; clients of a server send names.

    Args:
        lora_name: The name of the adapter.
        lora_int_id: Not used; `LoRARequest` has it at this position.
        lora_path: Folder or Hub repository to load the adapter from, if it is not loaded yet.
        load_inplace: Whether to load the adapter again, from `lora_path` or from where it came, in place of the one
            that has this name. It is loaded once per call, whatever the number of prompts.
        draft_path: Folder or Hub repository of the prefix for the draft model that is loaded with it, if any.
        path: Another name of `lora_path`, for use as a keyword.
        spec: The adapter itself, once the front end has looked it up. The request keeps it even if the name is replaced
            or unloaded before the request reaches the engine.
    """

    lora_int_id: int = 1
    lora_path: str = ""
    base_model_name: str | None = msgspec.field(default=None)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    spec: PrefixSpec | None = None
    draft_path: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        # vLLM's own requires a path.
        if self.spec is not None:
            return
        self.lora_path = self.path = os.fspath(self.lora_path or self.path or "")
        self.draft_path = os.fspath(self.draft_path or "")

    # vLLM keys its own tables by name. A prefix never equals the LoRA adapter of the same name.
    def __eq__(self, value: object) -> bool:
        return isinstance(value, PrefixAdapterRequest) and self.lora_name == value.lora_name

    def __hash__(self) -> int:
        return hash((PrefixAdapterRequest, self.lora_name))
