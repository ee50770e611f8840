"""LoRA adapters and prefixes look alike on disk. A prefix is recognized by its `adapter_config.json`, wherever it is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from peft_prefix_ext.checkpoint.atomic_save import config_of
from peft_prefix_ext.checkpoint.format import CONFIG_NAME, STOCK_TYPES
from peft_prefix_ext.checkpoint.regular_file import MAX_CONFIG_BYTES, read_regular
from vllm_plugin.adapters.remote import filesystem, is_remote

PREFIX_TYPES = ("PREFIX_EXT", *STOCK_TYPES)
# As vLLM takes it: without a folder or a revision.
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_TYPE = re.compile(rb'"peft_type"\s*:\s*"([A-Z_]+)"')
_lora_paths: set[str] = set()


def holds_prefix(source: str | Path) -> bool:
    """Returns whether an adapter is a prefix: one in a local folder, in remote storage, or in a repository of the Hub."""
    return adapter_type(source) in PREFIX_TYPES


def holds_lora(source: str | Path) -> bool:
    """Returns whether an adapter is a LoRA."""
    return adapter_type(source) == "LORA"


def adapter_type(source: str | Path) -> str | None:
    """Returns what PEFT calls the type of an adapter; None if there is none, or it cannot be read."""
    source = str(source)
    try:
        if is_remote(source):
            return _remote_type(source)
        folder = Path(source).expanduser()
        if folder.exists() or _REPO.fullmatch(source) is None:
            return _type_in(read_regular(config_of(folder), MAX_CONFIG_BYTES))
        return type_on_hub(source)
    except Exception:
        # No adapter, or one that cannot be read: whoever reads it says what is wrong.
        return None


def type_at_a_glance(folder: str) -> str | None:
    """Returns the type of the adapter in a local folder, for a listing of many: mostly without parsing its config."""
    try:
        config = read_regular(f"{folder}/{CONFIG_NAME}", MAX_CONFIG_BYTES)
    except OSError:
        return None
    # A config may name the types of other adapters as well.
    found = _TYPE.findall(config)
    return found[0].decode() if len(found) == 1 else adapter_type(folder)


def type_on_hub(repository: str) -> str | None:
    """Returns the type of the adapter in a repository of the Hub; None if there is none.

    Raises:
        Exception: Any error of the client of the Hub, if that cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        config = hf_hub_download(repository, CONFIG_NAME)
    except LocalEntryNotFoundError:
        # The Hub cannot be reached, and no copy is here.
        raise
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return None
    return _type_in(read_regular(config, MAX_CONFIG_BYTES))


def _remote_type(url: str) -> str | None:
    files, path = filesystem(url)
    return _type_in(files.cat_file(f"{path}/{CONFIG_NAME}", 0, MAX_CONFIG_BYTES))


def _type_in(config: bytes | bytearray) -> str | None:
    fields = json.loads(config)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    return kind if isinstance(kind, str) else None


def check_lora(request: Any) -> None:
    """Raises `PrefixRequestError` if a `LoRARequest` names a prefix, which would crash an engine without prefixes."""
    if request.lora_path and is_prefix_path(request.lora_path):
        from vllm_plugin.request_errors import PrefixRequestError

        raise PrefixRequestError(
            f"{request.lora_path} holds a prefix, not a LoRA; start with `LLM(..., **prefix_adapters({{{request.lora_name!r}: "
            f"path}}))`, and pass `PrefixAdapterRequest({request.lora_name!r})` instead of a `LoRARequest`."
        )


def is_prefix_path(path: str) -> bool:
    """Returns whether the path of a `LoRARequest` is the local folder of a prefix. That of a LoRA is looked into once."""
    if path in _lora_paths or is_remote(path) or not os.path.isdir(os.path.expanduser(path)):
        return False
    kind = adapter_type(path)
    # A folder without an adapter may get one.
    if kind is not None and kind not in PREFIX_TYPES:
        _lora_paths.add(path)
    return kind in PREFIX_TYPES
