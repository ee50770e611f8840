"""Whether a saved adapter fits the model at hand, and what that model calls its layers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.checkpoint.fingerprint import differences, fingerprint
from peft_prefix_ext.checkpoint.format import FORMAT_VERSION
from peft_prefix_ext.config import PrefixExtConfig

_LAYER = re.compile(r"base_model\.model\.(?P<module>.+)\.prefix_ext\.(?P<name>prefix_ext_(init_)?(key|value))")


def check_saved_adapter(config: PrefixExtConfig, model: PreTrainedModel, layers: list[dict[str, Any]] | None) -> None:
    """Checks that the adapter of `config`, if it is a saved one, was trained on a model like this.

    Args:
        config: The config of the adapter.
        model: The base model.
        layers: What would be recorded of the model's layers as `prefix_layers`; `None` to go without that check.

    Raises:
        ValueError: If it was not.
    """
    if config.format_version != FORMAT_VERSION:
        raise ValueError(
            f"The adapter has format version {config.format_version}, this release reads {FORMAT_VERSION}; upgrade "
            "peft-prefix-ext."
        )
    if not config.is_saved:
        return
    found = differences(config.base_fingerprint or {}, fingerprint(model.config))
    if not found and layers is not None and _without_names(layers) != _without_names(config.prefix_layers or []):
        found = ["its attention layers have other shapes"]
    if found:
        raise ValueError(
            f"The adapter was trained on another base model ({config.base_model_name_or_path or 'name not recorded'}): {'; '.join(found)}."
        )


def warn_of_other_base_name(config: PrefixExtConfig, model: PreTrainedModel) -> None:
    """Warns if the adapter of `config`, if it is a saved one, was trained on a model of another name.

    The same architecture has a base and an instruct model, and others that were trained on from them.
    """
    trained_on, name = config.base_model_name_or_path, model.name_or_path
    if config.is_saved and trained_on and name and Path(trained_on).name != Path(name).name:
        warnings.warn(
            f"The adapter was trained on {trained_on} and is loaded on {name}: the architecture fits, but only the same "
            "weights give the same answers.",
            stacklevel=2,
        )


def _without_names(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The same layers are "model.layers.0.self_attn" in a language model and "layers.0.self_attn" in its bare decoder.
    return [{name: value for name, value in row.items() if name != "module"} for row in layers]


def rename_to_model_modules(config: PrefixExtConfig, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a checkpoint with its layers called as in the model at hand, which may be built around other heads.

    Args:
        config: The config of the live adapter.
        saved: The checkpoint.
    """
    live = [row["module"] for row in config._recorded["prefix_layers"]]
    found = {match["module"] for name in saved if (match := _LAYER.fullmatch(name))}
    if len(found) != len(live) or found == set(live):
        return saved
    # Weights that come into an adapter made here bring no config along: their names count the layers.
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
