"""Reads adapters from disk or the Hub: checked when they are opened, and read again by the workers that serve them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peft_prefix_ext.checkpoint.base_adapters import model_with
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, PrefixCheckpointError, PrefixNotFoundError
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix
from vllm_plugin.adapters.adapter_kinds import holds_lora
from vllm_plugin.adapters.base_lora import find_base_lora
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter, Registry
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.speculation import draft_model
from vllm_plugin.adapters.validation import check_adapter, check_shapes, check_states
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


def open_adapter(option: AdapterOption, vllm_config: Any, registry: Registry | None = None) -> Adapter:
    """Reads one adapter and checks that this engine can serve it.

    Args:
        option: Its name and where it lies.
        vllm_config: The engine's config.
        registry: Where the engine has published its layers, if it has started.

    Raises:
        PrefixServeError: If it cannot be served. The message is one sentence that names the adapter.
    """
    try:
        return _open_adapter(option, vllm_config, registry)
    except PrefixServeError:
        raise
    except Exception as error:
        # The files may hold anything, and no list of the errors that this causes would be complete.
        raise PrefixServeError(
            f"Prefix adapter {option.name!r}: {option.path} is malformed ({type(error).__name__}: {error}); copy it again."
        ) from error


def _open_adapter(option: AdapterOption, vllm_config: Any, registry: Registry | None) -> Adapter:
    name = option.name
    checkpoint = load(name, option.path)
    check_adapter(name, checkpoint, vllm_config.model_config)
    if registry is not None and (layers := registry.layers()) is not None:
        check_shapes(name, checkpoint.layer_shapes, layers)
        check_states(name, checkpoint.state_shapes, registry.states())
    draft = None if option.draft_path is None else _open_draft(option, checkpoint.num_virtual_tokens, vllm_config)
    spec = _spec(name, option.path, checkpoint, draft=draft, **find_base_lora(name, checkpoint, vllm_config))
    return Adapter(
        spec, option.base_model_name, checkpoint.layer_shapes, checkpoint.state_shapes, checkpoint.chat_template
    )


def _open_draft(option: AdapterOption, num_virtual_tokens: int, vllm_config: Any) -> PrefixSpec:
    """Reads the prefix of the draft model that goes with an adapter, and checks it."""
    name, path = option.name, option.draft_path
    assert path is not None
    model = draft_model(vllm_config)
    if model is None:
        raise PrefixServeError(
            f"Prefix adapter {name!r} names a prefix for the draft model, and this engine has none; start it with "
            '--speculative-config \'{"method": "draft_model", "model": "MODEL", "num_speculative_tokens": 4}\', or leave out '
            "`draft_path`."
        )
    try:
        checkpoint = load(name, path)
        check_adapter(name, checkpoint, model)
    except PrefixServeError as error:
        raise type(error)(f"The prefix {path!r} for the draft model {model.model!r} cannot be used: {error}") from error
    if checkpoint.base_adapters:
        raise PrefixServeError(
            f"Prefix adapter {name!r}: the prefix for the draft model in {path} was trained on "
            f"{model_with(checkpoint.base_adapters)}, and draft models run without; train it on the draft model alone."
        )
    if checkpoint.num_virtual_tokens != num_virtual_tokens:
        raise PrefixServeError(
            f"Prefix adapter {name!r} has {num_virtual_tokens} virtual tokens, and its prefix for the draft model in {path} "
            f"has {checkpoint.num_virtual_tokens}; train both with the same number."
        )
    return _spec(name, path, checkpoint)


def _spec(name: str, source: str, checkpoint: PrefixCheckpoint, **more: Any) -> PrefixSpec:
    return PrefixSpec(
        name=name,
        source=source,
        # Links are resolved now: their target may be another adapter later.
        path=str(checkpoint.path.resolve()),
        num_virtual_tokens=checkpoint.num_virtual_tokens,
        digest=digest_of(checkpoint),
        **more,
    )


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
