"""Summaries of an adapter, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, state_table

# The config fields that say how an adapter was made.
MADE = ("init", "init_report", "reparam", "save_reparam")


def as_dict(prefix: PrefixCheckpoint) -> dict[str, Any]:
    """Returns all facts about an adapter, ready for JSON."""
    config = prefix.config
    return {
        "path": str(prefix.path),
        "peft_type": prefix.peft_type,
        "format_version": config.get("format_version"),
        "task_type": config.get("task_type"),
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "num_frozen_tokens": config.get("num_frozen_tokens", 0),
        "base_model_name_or_path": prefix.base_model_name_or_path,
        "base_fingerprint": prefix.base_fingerprint,
        "base_adapters": [adapter._asdict() for adapter in prefix.base_adapters],
        "num_bytes": prefix.num_bytes,
        "digest": prefix.digest,
        "made": {name: config[name] for name in MADE if config.get(name) is not None},
        "layers": [
            {
                "index": index,
                "module": prefix.modules.get(index),
                "attention": prefix.attentions[index],
                "key_shape": list(layer.key.shape),
                "value_shape": list(layer.value.shape),
                "dtype": str(layer.key.dtype).removeprefix("torch."),
                # The mean norm over heads and virtual tokens.
                "key_norm": round(float(layer.key.float().norm(dim=-1).mean()), 4),
                "value_norm": round(float(layer.value.float().norm(dim=-1).mean()), 4),
            }
            for index, layer in prefix.layers.items()
        ],
        "states": [
            {
                **row,
                "norm": round(
                    float(getattr(prefix.states[row["index"]], row["kind"])[row["number"]].float().norm()), 4
                ),
            }
            for row in state_table(prefix.states, prefix.state_modules)
        ],
    }


def as_text(prefix: PrefixCheckpoint) -> str:
    """Returns a few lines: type, base model, shapes, size and origin."""
    facts = as_dict(prefix)
    layers, base, made = facts["layers"], facts["base_fingerprint"], facts["made"]
    shapes: dict[str, list[int]] = {}
    for layer in layers:
        kind = f"{layer['attention']} " if prefix.is_encoder_decoder else ""
        shape = f"{kind}keys {layer['key_shape']}, values {layer['value_shape']}, {layer['dtype']}"
        shapes.setdefault(shape, []).append(layer["index"])
    states: dict[str, list[int]] = {}
    for state in facts["states"]:
        states.setdefault(f"{state['kind']} state {state['shape']}, {state['dtype']}", []).append(state["index"])
    frozen = f", the first {facts['num_frozen_tokens']} frozen" if facts["num_frozen_tokens"] else ""
    architecture = f" ({base.get('model_type')}, {base.get('num_hidden_layers')} layers)" if base else ""
    rows = [
        ("type", f"{facts['peft_type']}, task type {facts['task_type']}"),
        ("base model", f"{facts['base_model_name_or_path'] or 'not recorded'}{architecture}"),
        *(("on top of", str(adapter)) for adapter in prefix.base_adapters),
        ("prefix", f"{facts['num_virtual_tokens']} virtual tokens{frozen}"),
        *(("layers", f"{_ranges(indices)}: {shape}") for shape, indices in shapes.items()),
        *(("states", f"{_ranges(dict.fromkeys(indices))}: {shape}") for shape, indices in states.items()),
        ("size", f"{facts['num_bytes'] / 2**20:.2f} MiB, sha256 {facts['digest'][:16]}"),
    ]
    if layers:
        rows.insert(-1, ("norms", f"keys {_span(layers, 'key_norm')}, values {_span(layers, 'value_norm')}"))
    if made:
        origin = made.get("init_report") or f"init {made.get('init')!r}"
        rows.append(("made from", f"{origin}; reparameterization {made.get('reparam', 'none')!r}"))
    return "\n".join([facts["path"], *(f"  {name:<12}{text}" for name, text in rows)])


def _ranges(indices: Iterable[int]) -> str:
    """Formats sorted indices as in "0-3, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _span(layers: list[dict[str, Any]], name: str) -> str:
    norms = [layer[name] for layer in layers]
    return f"{min(norms):.3g} to {max(norms):.3g}"
