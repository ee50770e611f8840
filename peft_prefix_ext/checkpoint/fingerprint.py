"""The fingerprint of a base model's architecture, which must match for a prefix to work.

Computed from any object with the attributes of a transformers config, so that training (transformers) and serving (vLLM's
`hf_config`) agree without this module importing either. Weights are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Everything that changes the shape of the K/V, their positions, or which of them a query sees. Not the vocabulary: resized
# embeddings do not affect the prefix.
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
    """Returns the fingerprint of a transformers config, ready for JSON; for a multimodal model, that of its text part."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {name: _plain(_get(text_config, name)) for name in FIELDS}
    # Qwen2-MoE uses 0 for no window, which vLLM changes to None.
    values["sliding_window"] = values["sliding_window"] or None
    known = {name: value for name, value in values.items() if value is not None}
    if getattr(config, "is_encoder_decoder", False):
        known["is_encoder_decoder"] = True
    # If the architecture supports a window, record that there is none.
    return {"sliding_window": None, **known} if hasattr(text_config, "sliding_window") else known


def differences(adapter: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Returns one phrase for each field in which the fingerprint of an adapter differs from that of a base model.

    Fields that only one of them has are ignored: config classes gain and lose fields between releases.
    """
    return [
        f"{path} is {expected!r} in the adapter and {found!r} in the model"
        for path, expected, found in _walk("", adapter, model)
        if expected != found
    ]


def _walk(path: str, adapter: Any, model: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(adapter, dict) and isinstance(model, dict):
        for name in adapter.keys() & model.keys():
            yield from _walk(f"{path}.{name}" if path else name, adapter[name], model[name])
    else:
        yield path, adapter, model


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        # A config whose layers differ (Gemma 4) raises for fields that are per layer; the shapes are recorded anyway.
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
