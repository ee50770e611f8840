"""To and from stock PEFT: a prefix that PEFT loads without this package, and PEFT's own prefixes as ours.

PEFT keeps a prefix as one flat `prompt_embeddings`, `[num_virtual_tokens, num_layers * 2 * num_kv_heads * head_dim]`: all
layers of a model alike, keys as wide as values. Positions are the same on both sides: real tokens start behind the
prefix.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from peft_prefix_ext.checkpoint.base_adapters import model_with
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import STOCK_TYPES, PrefixCheckpoint, read_prefix
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.writer import write_adapter, write_prefix

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What an adapter keeps, whatever its type.
KEPT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def export_to_peft(
    source: str | Path | PrefixCheckpoint | PeftModel,
    folder: str | Path,
    peft_type: str = "PREFIX_TUNING",
    *,
    adapter_name: str | None = None,
    task_type: str | None = None,
) -> PrefixCheckpoint:
    """Writes an adapter that stock PEFT loads, with equal logits, in a process that never imports this package.

    Args:
        source: An adapter's folder or Hub repository, a checkpoint that was read, or a live `PeftModel`.
        folder: Where to write it, made if need be.
        peft_type: `"PREFIX_TUNING"`, or `"CARTRIDGE"`, which keeps `num_frozen_tokens` as well.
        adapter_name: The adapter of a live model; its active one by default.
        task_type: PEFT's task type, for an adapter that has none; stock prefixes cannot do without.

    Raises:
        ValueError: If stock PEFT has no place for this prefix: layers that differ or are left out, values of another
            width than keys, or shapes that it does not expect of this base model.
    """
    if peft_type not in STOCK_TYPES:
        raise ValueError(f"`peft_type` must be one of {STOCK_TYPES}, got {peft_type!r}.")
    prefix = read_source(source, adapter_name)
    if prefix.is_encoder_decoder:
        raise ValueError(
            f"The prefix in {prefix.path} cannot be exported to stock PEFT, where layers of an encoder-decoder model share "
            "their prefixes."
        )
    if prefix.base_adapters:
        raise ValueError(
            f"The prefix in {prefix.path} cannot be exported to stock PEFT, which does not know that it was trained on "
            f"{model_with(prefix.base_adapters)}."
        )
    task_type = prefix.config.get("task_type") or task_type
    if task_type is None:
        raise ValueError("`task_type` must be given: stock PEFT has no prefixes without, and the adapter has none.")
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

    `PeftModel.from_pretrained(base_model, folder)` loads it, and `is_trainable=True` goes on training it, with
    everything that stock PEFT refuses: gradient checkpointing, static caches, packing.

    Args:
        source: The adapter's folder or Hub repository, a checkpoint that was read, or a live `PeftModel`.
        folder: Where to write it, made if need be.
        base_model: The model it was trained on. Prefixes that it has already do not matter.
        adapter_name: The adapter of a live model; its active one by default.

    Raises:
        ValueError: If it is no stock prefix, or not one of this base model.
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
        # A cartridge may be frozen as a whole; with us there is always a token to train.
        num_frozen_tokens=min(prefix.config.get("num_frozen_tokens", 0), prefix.num_virtual_tokens - 1),
    )


def read_source(source: str | Path | PrefixCheckpoint | PeftModel, adapter_name: str | None = None) -> PrefixCheckpoint:
    """Reads a prefix from wherever it is: a folder or Hub repository, or an adapter of a live `PeftModel`."""
    if isinstance(source, PrefixCheckpoint):
        return source
    if isinstance(source, (str, Path)):
        return read_prefix(resolve(source))
    name = adapter_name or source.active_adapter
    with TemporaryDirectory() as folder:
        source.save_pretrained(folder, selected_adapters=[name])
        return read_prefix(folder if name == "default" else Path(folder) / name)


def check_fits(prefix: PrefixCheckpoint, base_model: PreTrainedModel) -> tuple[dict[int, str], dict[str, Any]]:
    """Returns the attention modules of the base model by layer index, and its fingerprint.

    Raises:
        ValueError: If the prefix was not made for this base model.
    """
    from peft_prefix_ext.base_model.compatibility import check_layers
    from peft_prefix_ext.base_model.layers import probe_layers
    from peft_prefix_ext.injection.decoder_hook import without_prefixes

    with without_prefixes(base_model):
        recorded = probe_layers(base_model)
    recorded = [layer for layer in recorded if layer.attention in prefix.attentions.values()]
    check_layers(prefix, base_model, recorded)
    return {layer.index: layer.module for layer in recorded}, fingerprint(base_model.config)


def _uniform_shape(prefix: PrefixCheckpoint) -> tuple[int, int]:
    """Returns the number of KV heads and their size, which stock PEFT has one of for all layers."""
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
    # PEFT corrects the shapes in an adapter's config by what the base model's says (`_prepare_prompt_learning_config`).
    expected = prefix.base_fingerprint.get("num_key_value_heads"), prefix.base_fingerprint.get("head_dim")
    if expected[0] is not None and (num_heads, head_dim) != (expected[0], expected[1] or head_dim):
        raise ValueError(
            f"{refusal} expects {expected[0]} KV heads of size {expected[1] or head_dim} by the base model's config: the "
            f"model has {num_heads} of size {head_dim}."
        )
    return num_heads, head_dim
