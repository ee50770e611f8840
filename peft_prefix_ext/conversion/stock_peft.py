"""Exports prefixes to stock PEFT, and imports PEFT's own prefixes.

PEFT stores a prefix as one flat `prompt_embeddings`, `[num_virtual_tokens, num_layers * 2 * num_kv_heads * head_dim]`: all
layers have one shape, and keys are as wide as values. Positions are the same in both formats: real tokens start after the
prefix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_prefix_ext.checkpoint.base_adapters import model_with
from peft_prefix_ext.checkpoint.format import STOCK_TYPES, PrefixCheckpoint
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.checkpoint.writer import write_adapter, write_prefix
from peft_prefix_ext.conversion.sources import KEPT, check_fits, read_source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def export_to_peft(
    source: str | Path | PrefixCheckpoint | PeftModel,
    folder: str | Path,
    peft_type: str = "PREFIX_TUNING",
    *,
    adapter_name: str | None = None,
    task_type: str | None = None,
) -> PrefixCheckpoint:
    """Writes an adapter that stock PEFT loads without this package, with equal logits.

    Args:
        source: The folder or Hub repository of an adapter, a checkpoint that was read, or a live `PeftModel`.
        folder: The folder to write to; it is created if needed.
        peft_type: `"PREFIX_TUNING"`, or `"CARTRIDGE"`, which also keeps `num_frozen_tokens`.
        adapter_name: The adapter of a live model; its active one by default.
        task_type: PEFT's task type, which stock prefixes require, if the adapter has none.

    Raises:
        ValueError: If stock PEFT cannot represent this prefix: states, layers that differ or are missing, values that are not as
            wide as keys, or shapes other than the base model's config says.
    """
    if peft_type not in STOCK_TYPES:
        raise ValueError(f"`peft_type` must be one of {STOCK_TYPES}, got {peft_type!r}.")
    prefix = read_source(source, adapter_name)
    if prefix.is_encoder_decoder:
        raise ValueError(
            f"The prefix in {prefix.path} cannot be exported to stock PEFT, where layers of an encoder-decoder model share "
            "their prefixes."
        )
    if prefix.states:
        raise ValueError(
            f"The prefix in {prefix.path} cannot be exported to stock PEFT, which has no states of recurrent layers."
        )
    if prefix.base_adapters:
        raise ValueError(
            f"The prefix in {prefix.path} cannot be exported to stock PEFT, which does not know that it was trained on "
            f"{model_with(prefix.base_adapters)}."
        )
    task_type = prefix.config.get("task_type") or task_type
    if task_type is None:
        raise ValueError("`task_type` must be given: stock PEFT requires one, and the adapter has none.")
    num_heads, head_dim = _uniform_shape(prefix)
    num_layers, p = len(prefix.layers), prefix.num_virtual_tokens
    config: dict[str, Any] = {
        **{name: prefix.config.get(name) for name in KEPT},
        "peft_type": peft_type,
        "task_type": task_type,
        "inference_mode": True,
        "num_virtual_tokens": p,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "token_dim": num_heads * head_dim,
        "num_transformer_submodules": 1,
    }
    if peft_type == "CARTRIDGE":
        config["num_frozen_tokens"] = prefix.config.get("num_frozen_tokens", 0)
    kv = torch.stack([torch.stack([*prefix.layers[index]]) for index in range(num_layers)])
    write_adapter(folder, config, {"prompt_embeddings": kv.permute(3, 0, 1, 2, 4).reshape(p, -1)})
    return read_prefix(folder)


def import_from_peft(
    source: str | Path | PrefixCheckpoint | PeftModel,
    folder: str | Path,
    base_model: PreTrainedModel,
    *,
    adapter_name: str | None = None,
) -> PrefixCheckpoint:
    """Writes a stock `PREFIX_TUNING` or `CARTRIDGE` adapter as a `PREFIX_EXT` one, with equal logits.

    `PeftModel.from_pretrained(base_model, folder)` loads it, and `is_trainable=True` continues its training, also with what
    stock PEFT refuses: gradient checkpointing, static caches, packing.

    Args:
        source: The folder or Hub repository of the adapter, a checkpoint that was read, or a live `PeftModel`.
        folder: The folder to write to; it is created if needed.
        base_model: The model it was trained on. Prefixes that are already on it are ignored.
        adapter_name: The adapter of a live model; its active one by default.

    Raises:
        ValueError: If it is not a stock prefix, or was trained on another base model.
    """
    prefix = read_source(source, adapter_name)
    if prefix.peft_type not in STOCK_TYPES:
        raise ValueError(f"The adapter in {prefix.path} is {prefix.peft_type} already; `PeftModel` loads it as it is.")
    modules, base_fingerprint = check_fits(prefix, base_model)
    kept = {name: prefix.config.get(name) for name in KEPT}
    return write_prefix(
        folder,
        prefix.layers,
        modules,
        **kept | {"base_model_name_or_path": kept["base_model_name_or_path"] or base_model.name_or_path or None},
        base_fingerprint=base_fingerprint,
        init_report=f"{prefix.num_virtual_tokens} virtual tokens: those of a stock {prefix.peft_type} adapter",
        # A cartridge may be completely frozen; PREFIX_EXT has at least one token that trains.
        num_frozen_tokens=min(prefix.config.get("num_frozen_tokens", 0), prefix.num_virtual_tokens - 1),
    )


def _uniform_shape(prefix: PrefixCheckpoint) -> tuple[int, int]:
    """Returns the number of KV heads and their size, which are the same for all layers in stock PEFT."""
    shapes = {(*layer.key.shape[::2], layer.value.shape[2]) for layer in prefix.layers.values()}
    num_heads, head_dim, value_dim = min(shapes)
    refusal = f"The prefix in {prefix.path} cannot be exported to stock PEFT, which"
    if len(shapes) > 1:
        raise ValueError(f"{refusal} knows one shape for all layers: its layers differ in heads or their size.")
    if head_dim != value_dim:
        raise ValueError(
            f"{refusal} has values as wide as keys: its keys have {head_dim} entries a head and its values {value_dim}."
        )
    kinds = set(prefix.base_fingerprint.get("layer_types") or ())
    recurrent = {kind for kind in kinds if not kind.endswith("attention")} | kinds & {"linear_attention"}
    if recurrent or sorted(prefix.layers) != list(range(len(prefix.layers))):
        raise ValueError(
            f"{refusal} does not work on hybrid models: this one has a prefix for layers {sorted(prefix.layers)} beside "
            "recurrent ones."
        )
    # PEFT overwrites the shapes in an adapter's config with those of the base model (`_prepare_prompt_learning_config`).
    expected = prefix.base_fingerprint.get("num_key_value_heads"), prefix.base_fingerprint.get("head_dim")
    if expected[0] is not None and (num_heads, head_dim) != (expected[0], expected[1] or head_dim):
        raise ValueError(
            f"{refusal} expects {expected[0]} KV heads of size {expected[1] or head_dim} by the base model's config: the "
            f"model has {num_heads} of size {head_dim}."
        )
    return num_heads, head_dim
