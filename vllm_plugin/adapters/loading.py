"""Reads adapters from disk, the Hub or remote storage: their headers when they are registered, all of it before the first request.

Registering thousands of adapters reads none of their values. What needs values, the digest and the search for NaN, waits for
the first request, or is known from an earlier start (`digest_cache.py`). The workers that serve an adapter read it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft_prefix_ext.checkpoint.base_adapters import model_with
from peft_prefix_ext.checkpoint.format import (
    WEIGHTS_NAME,
    PrefixCheckpoint,
    PrefixCheckpointError,
    PrefixNotFoundError,
)
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_header, read_prefix
from vllm_plugin.adapters.adapter_kinds import holds_lora
from vllm_plugin.adapters.base_lora import find_base_lora
from vllm_plugin.adapters.digest_cache import ValueFacts, digest_cache
from vllm_plugin.adapters.file_state import state_of
from vllm_plugin.adapters.options import AdapterOption
from vllm_plugin.adapters.registry import Adapter, Registry
from vllm_plugin.adapters.remote import fetch, is_remote
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.speculation import draft_model
from vllm_plugin.adapters.validation import check_adapter, check_shapes, check_states
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError
from vllm_plugin.kv_transfer_config import PINNED, settings_in

# Raises `PrefixServeError` if an engine cannot serve a prefix. Values are checked if they were read.
Check = Callable[[PrefixCheckpoint], None]
# From the name of an adapter and where it lies to the adapter, which is checked before its values are read, and with them.
Load = Callable[[str, str, Check], PrefixCheckpoint]


def folder_of(source: str) -> Path:
    """Returns the local folder of an adapter, a copy if it lies elsewhere.

    Args:
        source: A folder, `owner/name[/folder][@revision]` on the Hub, or an address of remote storage such as `s3://...`.

    Raises:
        PrefixNotFoundError: If there is none.
    """
    return fetch(source) if is_remote(source) else resolve(source)


def load(name: str, source: str, check: Check = lambda _: None) -> PrefixCheckpoint:
    """Reads one adapter.

    Raises:
        PrefixServeError: If it cannot be read. The message is one sentence that names the adapter.
    """
    return _told(name, source, lambda folder: _read(folder, check))


def load_known(name: str, source: str, check: Check) -> PrefixCheckpoint:
    """Reads one adapter as `load` does, but without its values if what they say is known already."""
    return _told(name, source, lambda folder: _read_known(folder, check) or _read(folder, check))


def load_header(name: str, source: str, check: Check) -> PrefixCheckpoint:
    """Reads one adapter as `load` does, but without its values, and so without its digest."""
    return _told(name, source, lambda folder: _checked(read_header(folder), check))


def _told(name: str, source: str, read: Callable[[Path], PrefixCheckpoint]) -> PrefixCheckpoint:
    folder = None
    try:
        folder = folder_of(source)
        return read(folder)
    except PrefixCheckpointError as error:
        error_type = AdapterNotFoundError if isinstance(error, PrefixNotFoundError) else PrefixServeError
        told = f"Prefix adapter {name!r}: {error}"
        if folder is not None and holds_lora(folder):
            told = (
                f"{told.rstrip('.')}; a LoRA is served with --enable-lora --lora-modules NAME=PATH, at run time by POST "
                "/v1/load_lora_adapter, and offline with a `LoRARequest`."
            )
        raise error_type(told) from error


def _checked(checkpoint: PrefixCheckpoint, check: Check) -> PrefixCheckpoint:
    check(checkpoint)
    return checkpoint


def _read(folder: Path, check: Check) -> PrefixCheckpoint:
    # What this engine cannot serve may be of any size.
    check(read_header(folder))
    weights = folder / WEIGHTS_NAME
    before = state_of(weights)
    checkpoint = _checked(read_prefix(folder), check)
    assert checkpoint.largest is not None
    if before is not None and before.is_settled and state_of(weights) == before:
        digest_cache().put(os.path.abspath(weights), before, ValueFacts(checkpoint.digest, checkpoint.largest))
    return checkpoint


def _read_known(folder: Path, check: Check) -> PrefixCheckpoint | None:
    """Returns an adapter without its values, if what they say is known."""
    weights = folder / WEIGHTS_NAME
    state = state_of(weights)
    facts = digest_cache().get(os.path.abspath(weights), state)
    if facts is None:
        return None
    header = read_header(folder)
    known = dataclasses.replace(header, digest=facts.digest, largest=facts.largest)
    # Unless the file was replaced before its header was read.
    return _checked(known, check) if state_of(weights) == state else None


def register_adapters(options: Iterable[AdapterOption], vllm_config: Any) -> list[Adapter]:
    """Checks adapters without their values, which wait for their first requests. There may be thousands.

    Raises:
        PrefixServeError: If one of them cannot be served.
    """
    return [open_adapter(option, vllm_config, read=load_header) for option in options]


def open_adapter(
    option: AdapterOption, vllm_config: Any, registry: Registry | None = None, read: Load = load
) -> Adapter:
    """Reads one adapter and checks that this engine can serve it.

    Args:
        option: Its name and where it lies.
        vllm_config: The engine's config.
        registry: Where the engine has published its layers, if it has started.
        read: `load`, `load_known` or `load_header`.

    Raises:
        PrefixServeError: If it cannot be served. The message is one sentence that names the adapter.
    """
    try:
        return _open(option, vllm_config, registry, read)
    except PrefixServeError:
        raise
    except Exception as error:
        # The files may hold anything, and no list of the errors that this causes would be complete.
        raise PrefixServeError(
            f"Prefix adapter {option.name!r}: {option.path} is malformed ({type(error).__name__}: {error}); copy it again."
        ) from error


def verify_adapter(adapter: Adapter, vllm_config: Any, registry: Registry) -> Adapter:
    """Reads an adapter of which only the header was read, and returns it with its digest.

    Raises:
        PrefixServeError: If it cannot be served.
    """
    spec = adapter.spec
    draft = None if spec.draft is None else spec.draft.path
    option = AdapterOption(spec.name, spec.path, adapter.base_model_name, draft, spec.pinned)
    try:
        opened = open_adapter(option, vllm_config, registry, load_known)
    except AdapterNotFoundError:
        if not is_elsewhere(spec):
            raise
        # The local copy is gone.
        draft = None if spec.draft is None else spec.draft.source
        option = AdapterOption(spec.name, spec.source, adapter.base_model_name, draft, spec.pinned)
        opened = open_adapter(option, vllm_config, registry, load_known)
    draft_spec = opened.spec.draft
    if draft_spec is not None and spec.draft is not None:
        draft_spec = dataclasses.replace(draft_spec, source=spec.draft.source)
    return dataclasses.replace(
        opened, spec=dataclasses.replace(opened.spec, source=spec.source, draft=draft_spec), files=adapter.files
    )


def _open(option: AdapterOption, vllm_config: Any, registry: Registry | None, read: Load) -> Adapter:
    name = option.name
    if option.pinned is None:
        settings = settings_in(vllm_config.kv_transfer_config) or {}
        option = option._replace(pinned=name in settings.get(PINNED, ()))

    def check(checkpoint: PrefixCheckpoint) -> None:
        check_adapter(name, checkpoint, vllm_config.model_config)
        if registry is not None and (layers := registry.layers()) is not None:
            check_shapes(name, checkpoint.layer_shapes, layers)
            check_states(name, checkpoint.state_shapes, registry.states())

    checkpoint = read(name, option.path, check)
    draft = None if option.draft_path is None else _open_draft(option, checkpoint.num_virtual_tokens, vllm_config, read)
    spec = _spec(option, option.path, checkpoint, draft=draft, **find_base_lora(name, checkpoint, vllm_config))
    if draft is not None and not draft.digest:
        # Both are read with the first request.
        spec = dataclasses.replace(spec, digest="")
    return Adapter(
        spec, option.base_model_name, checkpoint.layer_shapes, checkpoint.state_shapes, checkpoint.chat_template
    )


def _open_draft(option: AdapterOption, num_virtual_tokens: int, vllm_config: Any, read: Load) -> PrefixSpec:
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
        checkpoint = read(name, path, lambda checkpoint: check_adapter(name, checkpoint, model))
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
    return _spec(option, path, checkpoint)


def _spec(option: AdapterOption, source: str, checkpoint: PrefixCheckpoint, **more: Any) -> PrefixSpec:
    template = checkpoint.chat_template
    return PrefixSpec(
        name=option.name,
        source=source,
        # Links are resolved now: their target may be another adapter later.
        path=os.path.realpath(checkpoint.path),
        num_virtual_tokens=checkpoint.num_virtual_tokens,
        digest=digest_of(checkpoint) if checkpoint.digest else "",
        opening=None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
        pinned=bool(option.pinned),
        **more,
    )


def reload(spec: PrefixSpec) -> PrefixCheckpoint:
    """Reads the tensors of a prefix again, in a worker, which may be on another machine than the server.

    Raises:
        PrefixServeError: If the files are no longer those that were opened.
    """
    try:
        checkpoint = load(spec.name, spec.path)
    except AdapterNotFoundError as error:
        if not is_elsewhere(spec):
            raise AdapterNotFoundError(
                f"{error} This was node {platform.node()!r}; every node needs the folder, or an adapter from the Hub or from "
                "remote storage."
            ) from error
        # The local copy is gone, or is on the machine of the server.
        try:
            checkpoint = load(spec.name, spec.source)
        except PrefixServeError as elsewhere:
            raise type(elsewhere)(f"{elsewhere} This was node {platform.node()!r}.") from elsewhere
    if digest_of(checkpoint) != spec.digest:
        raise PrefixServeError(
            f"The weights of prefix adapter {spec.name!r} in {spec.path} are no longer those it was loaded with; load it "
            'again, in place of itself: on a server by POST /v1/load_prefix_adapter with "load_inplace": true, offline by a '
            "request with `load_inplace=True`."
        )
    return checkpoint


def is_elsewhere(spec: PrefixSpec) -> bool:
    """Returns whether the folder of a prefix is a local copy of what lies on the Hub or in remote storage."""
    return is_remote(spec.source) or os.path.realpath(os.path.expanduser(spec.source)) != spec.path


def digest_of(checkpoint: PrefixCheckpoint) -> str:
    """Returns the SHA-256, in hex, of the weights of a prefix and of the config that describes them."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return hashlib.sha256(f"{checkpoint.digest} {config}".encode()).hexdigest()
