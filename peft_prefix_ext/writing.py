"""Writes adapters of plain K/V, in the format of `checkpoint.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_prefix_ext.checkpoint import (
    CONFIG_NAME,
    CROSS,
    DECODER,
    ENCODER,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    LayerKV,
    PrefixCheckpoint,
    layer_key,
    read_prefix,
)
from peft_prefix_ext.replacing import replacing


def write_prefix(
    path: str | Path,
    layers: Mapping[int, LayerKV],
    modules: Mapping[int, str],
    attentions: Mapping[int, str] | None = None,
    **config: Any,
) -> PrefixCheckpoint:
    """Writes a `PREFIX_EXT` adapter, as `save_pretrained` writes one without a reparameterization, and reads it back.

    Args:
        path: The folder, made if need be. An adapter that is there already is replaced, even if `layers` were read from
            it.
        layers: K/V by layer index, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
        modules: The name of each layer's attention module within the base model.
        attentions: The kind of each layer, one of `ATTENTIONS`; the decoder's self-attention where it is not said.
        config: Further fields of `adapter_config.json`; `base_model_name_or_path`, `base_fingerprint` and `task_type` are
            what loading it with PEFT and serving it ask for.

    Raises:
        PrefixCheckpointError: If what was written is not a prefix: shapes that do not fit together, NaN or Inf.
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
    recorded = {
        "peft_type": "PREFIX_EXT",
        "num_virtual_tokens": rows[0]["key_shape"][1],
        "prefix_layers": rows,
        "cross_prefix": CROSS in kinds.values(),
        "encoder_prefix": ENCODER in kinds.values(),
        "reparam": "none",
        "format_version": FORMAT_VERSION,
        "inference_mode": True,
    }
    write_adapter(path, {**config, **recorded}, tensors)
    return read_prefix(path)


def write_adapter(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a folder in PEFT's layout: `config` as JSON, `tensors` as safetensors.

    Tensors may be mapped to a file that is replaced.
    """
    with replacing(Path(path)) as folder:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
