"""Reads and checks adapters: those in the format of `format.py`, and stock PEFT's prefixes."""

from __future__ import annotations

import dataclasses
import json
import marshal
import math
from pathlib import Path
from typing import Any

import torch

from peft_prefix_ext.checkpoint.atomic_save import config_of
from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter, read_base_adapters
from peft_prefix_ext.checkpoint.format import (
    ATTENTIONS,
    CONFIG_NAME,
    DECODER,
    FLOAT_DTYPES,
    FORMAT_VERSION,
    FORMAT_VERSIONS,
    STATES_VERSION,
    STOCK_TYPES,
    WEIGHTS_NAME,
    LayerKV,
    LayerState,
    PrefixCheckpoint,
    PrefixCheckpointError,
    PrefixNotFoundError,
    is_of_prefix,
    is_stock_encoder_decoder,
    layer_key,
    magnitude,
    state_key,
)
from peft_prefix_ext.checkpoint.regular_file import MAX_CONFIG_BYTES, read_regular
from peft_prefix_ext.checkpoint.safetensors_file import (
    MAX_KEPT_BYTES,
    SafetensorsError,
    SafetensorsFile,
    read_safetensors,
)


def read_prefix(path: str | Path) -> PrefixCheckpoint:
    """Reads and checks the adapter in the folder `path`.

    Raises:
        PrefixCheckpointError: If it cannot be used; the message says in one sentence what is wrong and what to do.
    """
    checkpoint = _read(Path(path), values=True)
    largest = 0.0
    for index, kind, tensor in checkpoint.tensors():
        found = magnitude(tensor)
        if not math.isfinite(found):
            raise PrefixCheckpointError(
                f"The {kind} of layer {index} in {checkpoint.path / WEIGHTS_NAME} holds NaN or Inf; train it again."
            )
        largest = max(largest, found)
    return dataclasses.replace(checkpoint, largest=largest)


def read_header(path: str | Path) -> PrefixCheckpoint:
    """Reads and checks the adapter in the folder `path` without its values: its config, and the header of its weights.

    Raises:
        PrefixCheckpointError: If it cannot be used, as far as that can be said without its values.
    """
    return _read(Path(path), values=False)


def _read(folder: Path, *, values: bool) -> PrefixCheckpoint:
    config = _read_config(folder)
    peft_type = config["peft_type"]
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        other = " (adapter_model.bin is a pickle and is never read)" if (folder / "adapter_model.bin").exists() else ""
        raise PrefixCheckpointError(f"No {WEIGHTS_NAME} in {folder}{other}; save the adapter with safetensors.")
    p = config.get("num_virtual_tokens")
    if not isinstance(p, int) or isinstance(p, bool) or p < 1:
        raise PrefixCheckpointError(f"`num_virtual_tokens` in {folder / CONFIG_NAME} must be >= 1, got {p!r}.")

    def choose(header: SafetensorsFile) -> set[str]:
        # Only what the config describes takes memory, and only if the file has it in this shape.
        _read_known_tables(header, config, folder)
        return _tensor_names(config)

    try:
        tensors = read_safetensors(weights, choose if values else None)
    except (SafetensorsError, OSError) as error:
        raise PrefixCheckpointError(f"{weights} cannot be read as safetensors ({error}); copy it again.") from error
    layers, states, state_modules = (_read_tables if values else _read_known_tables)(tensors, config, folder)
    return PrefixCheckpoint(
        path=folder,
        peft_type=peft_type,
        num_virtual_tokens=p,
        layers=layers,
        base_model_name_or_path=config.get("base_model_name_or_path"),
        base_fingerprint=config.get("base_fingerprint") or {},
        digest=tensors.digest,
        modules={} if peft_type in STOCK_TYPES else {row["index"]: row["module"] for row in config["prefix_layers"]},
        base_adapters=_base_adapters(config, folder),
        config=config,
        states=states,
        state_modules=state_modules,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PrefixNotFoundError(f"No prefix adapter at {folder}: there is no such folder.")
    try:
        try:
            text = read_regular(config_of(folder), MAX_CONFIG_BYTES)
        except FileNotFoundError:  # a pending config was just moved into place
            text = read_regular(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
        config = json.loads(text.decode())
    except FileNotFoundError as error:
        raise PrefixNotFoundError(f"No {CONFIG_NAME} in {folder}: it is not a PEFT adapter.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PrefixCheckpointError(
            f"{folder / CONFIG_NAME} cannot be read as JSON ({error}); copy it again."
        ) from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "PREFIX_EXT" and peft_type not in STOCK_TYPES:
        raise PrefixCheckpointError(
            f"The adapter in {folder} is of type {peft_type!r}, not a prefix: expected PREFIX_EXT, PREFIX_TUNING or "
            "CARTRIDGE."
        )
    version = config.get("format_version", FORMAT_VERSION)
    if version not in FORMAT_VERSIONS:
        raise PrefixCheckpointError(
            f"The adapter in {folder} has format version {version!r}, this release reads {FORMAT_VERSION} and "
            f"{STATES_VERSION}: upgrade peft-prefix-ext."
        )
    return config


def _base_adapters(config: dict[str, Any], folder: Path) -> tuple[BaseAdapter, ...]:
    try:
        return read_base_adapters(config.get("base_adapters") or [])
    except ValueError as error:
        raise PrefixCheckpointError(f"{folder / CONFIG_NAME} is malformed: {error}") from error


# Layers and states, and the modules of the states, by layer index.
_Tables = tuple[dict[int, LayerKV], dict[int, LayerState], dict[int, str]]
# The latest tables of headers. Thousands of adapters of one model have the same, and building them takes most of the time.
_known_tables: dict[Any, _Tables] = {}
_MAX_KNOWN_TABLES = 64
# The fields of a config that the tables depend on.
_TABLE_FIELDS = (
    *("peft_type", "num_virtual_tokens", "format_version", "prefix_layers", "prefix_states"),
    *("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"),
)


def _read_known_tables(tensors: SafetensorsFile, config: dict[str, Any], folder: Path) -> _Tables:
    """Reads the tables of a file whose header alone was read, on the meta device; they are shared and must not be changed."""
    # `marshal` is the fastest way to something hashable; its version 2 depends on nothing but the values.
    key = tensors.header, marshal.dumps([config.get(name) for name in _TABLE_FIELDS], 2)
    tables = _known_tables.get(key)
    if tables is None:
        tables = _read_tables(tensors, config, folder)
        if len(_known_tables) >= _MAX_KNOWN_TABLES:
            _known_tables.clear()
        if sum(map(len, key)) <= MAX_KEPT_BYTES:
            _known_tables[key] = tables
    return tables


def _tensor_names(config: dict[str, Any]) -> set[str]:
    """Returns the names of the tensors in the tables of a config that was checked."""
    if config["peft_type"] in STOCK_TYPES:
        return {"prompt_embeddings"}
    layers = {layer_key(row["module"], kind) for row in config["prefix_layers"] for kind in ("key", "value")}
    states = config.get("prefix_states") or []
    return layers | {state_key(row["module"], row["kind"], row["number"]) for row in states}


def _read_tables(tensors: SafetensorsFile, config: dict[str, Any], folder: Path) -> _Tables:
    _refuse_other_weights(tensors, folder / WEIGHTS_NAME)
    read = _read_stock if config["peft_type"] in STOCK_TYPES else _read_prefix_ext
    layers = read(tensors, config, config["num_virtual_tokens"], folder)
    return layers, *_read_states(tensors, config, folder)


def _refuse_other_weights(tensors: SafetensorsFile, weights: Path) -> None:
    """Raises `PrefixCheckpointError` if modules of the base model were trained or resized with the prefix."""
    others = [name for name in tensors.headers if not is_of_prefix(name) and name != "prompt_embeddings"]
    if others:
        raise PrefixCheckpointError(
            f"{weights} holds weights of the base model beside the prefix ({others[0]}), which are not part of a "
            "prefix; train without `modules_to_save`, `trainable_token_indices` or resized embeddings."
        )


def _read_prefix_ext(tensors: SafetensorsFile, config: dict[str, Any], p: int, folder: Path) -> dict[int, LayerKV]:
    table = config.get("prefix_layers")
    if not isinstance(table, list) or not (table or config.get("prefix_states")):
        raise PrefixCheckpointError(f"`prefix_layers` is missing from {folder / CONFIG_NAME}; save the adapter again.")
    layers: dict[int, LayerKV] = {}
    for row in table:
        try:
            index, module = row["index"], row["module"]
            shapes = {kind: list(row[f"{kind}_shape"]) for kind in ("key", "value")}
            well_formed = type(index) is int and index >= 0 and index not in layers and isinstance(module, str)
            well_formed = well_formed and all(len(shape) == 3 for shape in shapes.values())
            well_formed = well_formed and row.get("attention", DECODER) in ATTENTIONS
        except (KeyError, TypeError):
            well_formed = False
        if not well_formed:
            raise PrefixCheckpointError(f"`prefix_layers` in {folder / CONFIG_NAME} has a malformed row: {row!r}.")
        pair = [_checked(tensors, layer_key(module, kind), shapes[kind], folder) for kind in ("key", "value")]
        (key_heads, key_tokens, _), (value_heads, value_tokens, _) = (tensor.shape for tensor in pair)
        if (key_heads, key_tokens) != (value_heads, value_tokens) or key_tokens != p:
            raise PrefixCheckpointError(
                f"Layer {index} of the adapter in {folder} has keys {shapes['key']} and values {shapes['value']}, which "
                f"do not fit together as [num_kv_heads, {p}, head_dim]."
            )
        layers[index] = LayerKV(*pair)
    return layers


def _read_states(
    tensors: SafetensorsFile, config: dict[str, Any], folder: Path
) -> tuple[dict[int, LayerState], dict[int, str]]:
    """Reads the states of recurrent layers, and the names of their modules, by layer index."""
    table = config.get("prefix_states") or []
    if not isinstance(table, list) or bool(table) != (config.get("format_version") == STATES_VERSION):
        raise PrefixCheckpointError(
            f"`prefix_states` in {folder / CONFIG_NAME} must list the states of format version {STATES_VERSION}; save the "
            "adapter again."
        )
    states: dict[int, LayerState] = {}
    modules: dict[int, str] = {}
    for row in table:
        try:
            index, module, kind, number, shape = (row[name] for name in ("index", "module", "kind", "number", "shape"))
            well_formed = type(index) is int and index >= 0 and isinstance(module, str) and isinstance(shape, list)
            well_formed = well_formed and modules.setdefault(index, module) == module and kind in LayerState._fields
            state = states.setdefault(index, LayerState())
            # In order, so that none is missing or given twice.
            well_formed = well_formed and number == len(getattr(state, kind))
        except (KeyError, TypeError):
            well_formed = False
        if not well_formed:
            raise PrefixCheckpointError(f"`prefix_states` in {folder / CONFIG_NAME} has a malformed row: {row!r}.")
        tensor = _checked(tensors, state_key(module, kind, number), shape, folder)
        states[index] = state._replace(**{kind: (*getattr(state, kind), tensor)})
    return states, modules


def _read_stock(tensors: SafetensorsFile, config: dict[str, Any], p: int, folder: Path) -> dict[int, LayerKV]:
    """Splits PEFT's flat layout like `PeftModel.get_prompt` (peft 0.21, peft_model.py)."""
    sizes: list[Any] = [config.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[2] % sizes[1]:
        raise PrefixCheckpointError(
            f"`num_layers`, `num_attention_heads` and `token_dim` in {folder / CONFIG_NAME} must say the shape of the "
            f"prefix, got {sizes}."
        )
    if config.get("num_transformer_submodules") not in (None, 1, 2):
        raise PrefixCheckpointError(
            f"`num_transformer_submodules` in {folder / CONFIG_NAME} must be 1 or 2, got "
            f"{config['num_transformer_submodules']!r}."
        )
    num_layers, num_heads, token_dim = sizes
    flat = _checked(tensors, "prompt_embeddings", [p, num_layers * 2 * token_dim], folder)
    kv = flat.view(p, num_layers, 2, num_heads, token_dim // num_heads).permute(1, 2, 3, 0, 4)
    # For an encoder-decoder model `get_prompt` repeats the rows for the cross-attention, whose prefix it then drops, so that
    # the decoder layers get every other row.
    rows = [2 * index % num_layers if is_stock_encoder_decoder(config) else index for index in range(num_layers)]
    return {index: LayerKV(kv[row, 0].contiguous(), kv[row, 1].contiguous()) for index, row in enumerate(rows)}


def _checked(tensors: SafetensorsFile, name: str, shape: list[int], folder: Path) -> torch.Tensor:
    """Reads one tensor after comparing its header with the config, so that a malformed file cannot cause an allocation."""
    header = tensors.headers.get(name)
    if header is None:
        raise PrefixCheckpointError(f"{folder / WEIGHTS_NAME} has no tensor {name!r}; save the adapter again.")
    if list(header.shape) != shape or header.dtype not in FLOAT_DTYPES:
        raise PrefixCheckpointError(
            f"{name!r} in {folder / WEIGHTS_NAME} is {header.dtype} {list(header.shape)}, expected floats of shape {shape}."
        )
    return tensors.tensor(name)
