"""Reads adapters from disk or the Hub: checked when they are opened, and read again by the workers that serve them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, PrefixCheckpointError, PrefixNotFoundError
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix
from vllm_plugin.adapters.adapter_kinds import holds_lora
from vllm_plugin.adapters.base_lora import find_base_lora
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter, Shapes
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.validation import check_adapter, check_shapes
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError


def load(name: str, source: str) -> PrefixCheckpoint:
    """Reads one adapter.

    Raises:
        PrefixServeError: If it cannot be read. The message is one sentence that names the adapter.
    """
    try:
        return read_prefix(resolve(source))
    except PrefixCheckpointError as error:
        error_type = AdapterNotFoundError if isinstance(error, PrefixNotFoundError) else PrefixServeError
        told = f"Prefix adapter {name!r}: {error}"
        if holds_lora(source):
            told = (
                f"{told.rstrip('.')}; a LoRA is served with --enable-lora --lora-modules NAME=PATH, at run time by POST "
                "/v1/load_lora_adapter, and offline with a `LoRARequest`."
            )
        raise error_type(told) from error


def open_adapters(options: Iterable[AdapterOption], vllm_config: Any) -> list[Adapter]:
    """Reads and checks adapters, a few at a time. There may be thousands, so no tensors are kept.

    Raises:
        PrefixServeError: If one of them cannot be served.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda option: open_adapter(option, vllm_config), options))


def open_adapter(option: AdapterOption, vllm_config: Any, layers: Shapes | None = None) -> Adapter:
    """Reads one adapter and checks that this engine can serve it.

    Args:
        option: Its name and where it lies.
        vllm_config: The engine's config.
        layers: The shapes of the engine's layers, if it has started.

    Raises:
        PrefixServeError: If it cannot be served. The message is one sentence that names the adapter.
    """
    try:
        return _open_adapter(option, vllm_config, layers)
    except PrefixServeError:
        raise
    except Exception as error:
        # The files may hold anything, and no list of the errors that this causes would be complete.
        raise PrefixServeError(
            f"Prefix adapter {option.name!r}: {option.path} is malformed ({type(error).__name__}: {error}); copy it again."
        ) from error


def _open_adapter(option: AdapterOption, vllm_config: Any, layers: Shapes | None) -> Adapter:
    name = option.name
    checkpoint = load(name, option.path)
    check_adapter(name, checkpoint, vllm_config)
    if layers is not None:
        check_shapes(name, checkpoint.layer_shapes, layers)
    spec = PrefixSpec(
        name=name,
        source=option.path,
        # Links are resolved now: their target may be another adapter later.
        path=str(checkpoint.path.resolve()),
        num_virtual_tokens=checkpoint.num_virtual_tokens,
        digest=digest_of(checkpoint),
        **find_base_lora(name, checkpoint, vllm_config),
    )
    return Adapter(spec, option.base_model_name, checkpoint.layer_shapes, checkpoint.chat_template)


def reload(spec: PrefixSpec) -> PrefixCheckpoint:
    """Reads the tensors of a prefix again, in a worker.

    Raises:
        PrefixServeError: If the files are no longer those that were opened.
    """
    checkpoint = load(spec.name, spec.path)
    if digest_of(checkpoint) != spec.digest:
        raise PrefixServeError(
            f"The weights of prefix adapter {spec.name!r} in {spec.path} are no longer those it was loaded with; load it "
            'again, in place of itself: on a server by POST /v1/load_prefix_adapter with "load_inplace": true, offline by a '
            "request with `load_inplace=True`."
        )
    return checkpoint


def digest_of(checkpoint: PrefixCheckpoint) -> str:
    """Returns the SHA-256, in hex, of the weights of a prefix and of the config that describes them."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return hashlib.sha256(f"{checkpoint.digest} {config}".encode()).hexdigest()
