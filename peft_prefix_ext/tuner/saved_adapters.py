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
    compare_layers,
    layers_in_words,
    other_base_model,
)
from peft_prefix_ext.checkpoint.fingerprint import differences, fingerprint
from peft_prefix_ext.checkpoint.format import DECODER, FORMAT_VERSION
from peft_prefix_ext.config import PrefixExtConfig

_LAYER = re.compile(r"base_model\.model\.(?P<module>.+)\.prefix_ext\.(?P<name>prefix_ext_(init_)?(key|value))")


def check_saved_adapter(config: PrefixExtConfig, model: PreTrainedModel, layers: list[dict[str, Any]] | None) -> None:
    """Checks that a saved adapter was trained on a model like this; a config that was never saved always passes.

    Args:
        config: The config of the adapter.
        model: The base model.
        layers: The model's layers, as they would be saved in `prefix_layers`; `None` to skip this check.

    Raises:
        ValueError: If the adapter does not fit.
    """
    if config.format_version != FORMAT_VERSION:
        raise ValueError(
            f"The adapter has format version {config.format_version}, this release reads {FORMAT_VERSION}; upgrade "
            "peft-prefix-ext."
        )
    if not config.is_saved:
        return
    found = differences(config.base_fingerprint or {}, fingerprint(model.config))
    if not found and layers is not None:
        found = _layer_differences(config.prefix_layers or [], layers)
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
    live = [row["module"] for row in config._saved_fields["prefix_layers"]]
    found = {match["module"] for name in saved if (match := _LAYER.fullmatch(name))}
    if len(found) != len(live) or found == set(live):
        return saved
    # Weights loaded into an adapter that was created here come without a config: the numbers in their names order them.
    order = [row["module"] for row in config.prefix_layers or []] or sorted(found, key=_numbers)
    names = dict(zip(order, live, strict=True))
    renamed = {}
    for name, tensor in saved.items():
        match = _LAYER.fullmatch(name)
        if match and match["module"] in names:
            name = f"base_model.model.{names[match['module']]}.prefix_ext.{match['name']}"
        renamed[name] = tensor
    return renamed


def _numbers(module: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", module)], module
