"""Loading a saved adapter: whether it fits the live model, and what that model calls its layers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.checkpoint.compatibility import (
    LayerShape,
    StateShape,
    compare_layers,
    compare_states,
    layers_in_words,
    other_base_model,
)
from peft_prefix_ext.checkpoint.fingerprint import differences, fingerprint
from peft_prefix_ext.checkpoint.format import DECODER, FORMAT_VERSIONS
from peft_prefix_ext.config import PrefixExtConfig

_LAYER = re.compile(r"base_model\.model\.(?P<module>.+)\.prefix_ext\.(?P<name>prefix_ext_(init_)?(key|value))")
_STATE = re.compile(r"base_model\.model\.(?P<module>.+)\.prefix_ext\.(?P<name>prefix_ext_(conv|recurrent)_state_\d+)")


def check_saved_adapter(config: PrefixExtConfig, model: PreTrainedModel, live: dict[str, Any] | None) -> None:
    """Checks that a saved adapter was trained on a model like this; a config that was never saved always passes.

    Args:
        config: The config of the adapter.
        model: The base model.
        live: The fields on the model's layers, as they would be saved; `None` to skip this check.

    Raises:
        ValueError: If the adapter does not fit.
    """
    if config.format_version not in FORMAT_VERSIONS:
        readable = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(
            f"The adapter has format version {config.format_version}, this release reads {readable}; upgrade "
            "peft-prefix-ext."
        )
    if not config.is_saved:
        return
    found = differences(config.base_fingerprint or {}, fingerprint(model.config))
    if not found and live is not None:
        found = _layer_differences(config.prefix_layers or [], live["prefix_layers"])
        found = found or _state_differences(config.prefix_states or [], live["prefix_states"] or [])
    if found:
        raise ValueError(other_base_model("The adapter", config.base_model_name_or_path, found))


def _layer_differences(saved: list[dict[str, Any]], live: list[dict[str, Any]]) -> list[str]:
    try:
        if found := layers_in_words(compare_layers(_shapes(saved), _shapes(live))):
            return found
        same = _kinds_and_lengths(saved) == _kinds_and_lengths(live)
    except (KeyError, TypeError, ValueError):
        return ["its `prefix_layers` are malformed"]
    return [] if same else ["its layers are of other kinds of attention or have prefixes of another length"]


def _state_differences(saved: list[dict[str, Any]], live: list[dict[str, Any]]) -> list[str]:
    try:
        rows = [
            [StateShape(row["index"], row["kind"], row["number"], tuple(row["shape"])) for row in table]
            for table in (saved, live)
        ]
    except (KeyError, TypeError):
        return ["its `prefix_states` are malformed"]
    return compare_states(*rows)[:1]


def _shapes(layers: list[dict[str, Any]]) -> list[LayerShape]:
    return [LayerShape(row["index"], *row["key_shape"][::2], *row["value_shape"][2:]) for row in layers]


def _kinds_and_lengths(layers: list[dict[str, Any]]) -> list[tuple[int, str, int]]:
    # Not the module: "model.layers.0.self_attn" of a language model is "layers.0.self_attn" in its bare decoder.
    return [(row["index"], row.get("attention", DECODER), row["key_shape"][1]) for row in layers]


def warn_of_other_base_name(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    """Warns if a saved adapter was trained on a model of another name.

    A base model and the models that were fine-tuned from it share one architecture.
    """
    trained_on, name = config.base_model_name_or_path, model.name_or_path
    if config.is_saved and trained_on and name and Path(trained_on).name != Path(name).name:
        warnings.warn(
            f"The adapter was trained on {trained_on} and is loaded on {name}: the architecture fits, but only the same "
            "weights give the same answers.",
            stacklevel=2,
        )


def rename_to_model_modules(config: PrefixExtConfig, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the layers of a checkpoint to the modules of the live model, which may have another head.

    Args:
        config: The config of the live adapter.
        saved: The checkpoint.
    """
    for pattern, table in ((_LAYER, "prefix_layers"), (_STATE, "prefix_states")):
        saved = _rename(pattern, getattr(config, table) or [], config._saved_fields[table] or [], saved)
    return saved


def _rename(
    pattern: re.Pattern[str],
    saved_table: list[dict[str, Any]],
    live_table: list[dict[str, Any]],
    saved: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    live = [*dict.fromkeys(row["module"] for row in live_table)]
    found = {match["module"] for name in saved if (match := pattern.fullmatch(name))}
    if len(found) != len(live) or found == set(live):
        return saved
    # Weights loaded into an adapter that was created here come without a config: the numbers in their names order them.
    order = [*dict.fromkeys(row["module"] for row in saved_table)] or sorted(found, key=_numbers)
    names = dict(zip(order, live, strict=True))
    renamed = {}
    for name, tensor in saved.items():
        match = pattern.fullmatch(name)
        if match and match["module"] in names:
            name = f"base_model.model.{names[match['module']]}.prefix_ext.{match['name']}"
        renamed[name] = tensor
    return renamed


def _numbers(module: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", module)], module
