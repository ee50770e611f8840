"""Writes adapters of plain K/V and states in the format of `format.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_prefix_ext.checkpoint.atomic_save import replacing
from peft_prefix_ext.checkpoint.format import (
    CONFIG_NAME,
    CROSS,
    DECODER,
    ENCODER,
    FORMAT_VERSION,
    STATES_VERSION,
    STOCK_TYPES,
    WEIGHTS_NAME,
    LayerKV,
    LayerState,
    PrefixCheckpoint,
    PrefixCheckpointError,
    layer_key,
    state_key,
    state_table,
)
from peft_prefix_ext.checkpoint.local_paths import absolute_if_local
from peft_prefix_ext.checkpoint.reader import read_prefix

PREFIX_TYPES = ("PREFIX_EXT", *STOCK_TYPES)


def write_prefix(
    path: str | Path,
    layers: Mapping[int, LayerKV],
    modules: Mapping[int, str],
    attentions: Mapping[int, str] | None = None,
    states: Mapping[int, LayerState] | None = None,
    state_modules: Mapping[int, str] | None = None,
    **config: Any,
) -> PrefixCheckpoint:
    """Writes a `PREFIX_EXT` adapter, like `save_pretrained` without a reparameterization, and reads it back.

    Args:
        path: The folder; it is created if needed. An existing prefix is replaced, even if `layers` were read from it.
        layers: K/V by layer index, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
        modules: The name of each layer's attention module in the base model.
        attentions: The kind of attention of each layer, one of `ATTENTIONS`; the decoder's self-attention by default.
        states: The states of recurrent layers by layer index, if any.
        state_modules: The name of each recurrent layer's module in the base model.
        config: Further fields of `adapter_config.json`. Loading it with PEFT and serving it need
            `base_model_name_or_path`, `base_fingerprint` and `task_type`; a prefix of states alone needs
            `num_virtual_tokens`.

    Raises:
        PrefixCheckpointError: If this is not a prefix (shapes that do not match, NaN or Inf), or if `path` holds something
            else, see `check_place`.
    """
    kinds = dict(attentions or {})
    rows: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in sorted(layers.items()):
        rows.append({"index": index, "module": modules[index]})
        if kinds.get(index, DECODER) != DECODER:
            rows[-1]["attention"] = kinds[index]
        for kind, tensor in zip(layer._fields, layer, strict=True):
            rows[-1][f"{kind}_shape"] = list(tensor.shape)
            tensors[layer_key(modules[index], kind)] = tensor
    names = dict(state_modules or {})
    for index, state in sorted((states or {}).items()):
        for kind, number, tensor in state.numbered():
            tensors[state_key(names[index], kind, number)] = tensor
    state_rows = state_table(states or {}, names)
    format_fields = {
        "peft_type": "PREFIX_EXT",
        "num_virtual_tokens": rows[0]["key_shape"][1] if rows else config["num_virtual_tokens"],
        "prefix_layers": rows,
        **({"prefix_states": state_rows} if state_rows else {}),
        "cross_prefix": CROSS in kinds.values(),
        "encoder_prefix": ENCODER in kinds.values(),
        "reparam": "none",
        "format_version": STATES_VERSION if state_rows else FORMAT_VERSION,
        "inference_mode": True,
    }
    config.pop("prefix_states", None)  # those of the adapter that the other fields came from
    write_adapter(path, {**config, **format_fields}, tensors)
    return read_prefix(path)


def check_place(folder: str | Path, replaced: Sequence[str] = PREFIX_TYPES) -> None:
    """Raises `PrefixCheckpointError` if writing an adapter to `folder` would destroy something else.

    That is the case for an adapter of another type, which would be lost, and for a model, whose folder would be taken for
    that of the adapter. Unrelated files stay.

    Args:
        folder: The folder to write to.
        replaced: The types of adapters that may be replaced.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PrefixCheckpointError(f"{folder} is a file: name a folder to write the adapter to.")
    try:
        found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError:
        if (folder / "config.json").exists():
            raise PrefixCheckpointError(f"{folder} holds a model: name another folder for the adapter.") from None
    except (OSError, ValueError, AttributeError):
        raise PrefixCheckpointError(
            f"{folder} holds an {CONFIG_NAME} that cannot be read: name another folder, or remove this one."
        ) from None
    else:
        if found not in replaced:
            raise PrefixCheckpointError(
                f"{folder} holds an adapter of type {found}, which would be lost: name another folder, or remove this one."
            )


def write_adapter(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a folder in PEFT's layout: `config` as JSON, `tensors` as safetensors.

    Raises:
        PrefixCheckpointError: If `path` holds something else, see `check_place`.
    """
    check_place(path)
    fields = {**config, "base_model_name_or_path": absolute_if_local(config.get("base_model_name_or_path"))}
    with replacing(Path(path)) as folder:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
