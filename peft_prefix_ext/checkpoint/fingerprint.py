"""The fingerprint of a base model's architecture: what must agree for a prefix to mean the same thing on it.

Duck-typed on a transformers config, so that the training half (transformers) and the serving half (vLLM's `hf_config`)
compute it alike without this module importing either. Weights are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Everything that changes the shape of the K/V, where they stand, or which of them a query sees. The vocabulary is left
# out on purpose: resized embeddings do not touch the prefix.
FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)


def fingerprint(config: Any) -> dict[str, Any]:
    """Returns the JSON-ready fingerprint of a transformers config (of its text part, for a multimodal one)."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {name: _plain(_get(text_config, name)) for name in FIELDS}
    # Qwen2-MoE says 0 where there is no window, and vLLM makes that None.
    values["sliding_window"] = values["sliding_window"] or None
    known = {name: value for name, value in values.items() if value is not None}
    if getattr(config, "is_encoder_decoder", False):
        known["is_encoder_decoder"] = True
    # Where there could be a window, none at all is as much a fact as one.
    return {"sliding_window": None, **known} if hasattr(text_config, "sliding_window") else known


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Says, one phrase each, where a recorded fingerprint disagrees with the one of the base model at hand.

    A field that only one side knows is no disagreement: config classes gain and lose fields between releases.
    """
    return [
        f"{path} is {expected!r} in the adapter and {found!r} in the model"
        for path, expected, found in _walk("", recorded, present)
        if expected != found
    ]


def _walk(path: str, recorded: Any, present: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(recorded, dict) and isinstance(present, dict):
        for name in recorded.keys() & present.keys():
            yield from _walk(f"{path}.{name}" if path else name, recorded[name], present[name])
    else:
        yield path, recorded, present


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        # A config whose layers differ (Gemma 4) refuses to answer for all of them; their shapes are recorded anyhow.
        return None


def _plain(value: Any) -> Any:
    """Reduces a config value to what survives a round trip through JSON."""
    if isinstance(value, dict):
        return {str(name): plain for name, item in value.items() if (plain := _plain(item)) is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
