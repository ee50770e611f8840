"""Whether an adapter fits a base model: the one comparison that loading, conversion and serving share.

An adapter fits when the fingerprints of the two architectures agree (`fingerprint.py`), every layer with a KV cache has the same shape in
both, and so have the states of recurrent layers, if the adapter has any. A caller says what it knows of its model, and words its own error or takes the sentence from here:

    found = differences(prefix.base_fingerprint, fingerprint(config))
    if found := found or layers_in_words(compare_layers(prefix.layer_shapes, model_shapes)):
        raise ValueError(other_base_model(f"Prefix adapter {name!r}", prefix.base_model_name_or_path, found))

Plain numbers and strings only: imports neither torch nor peft, transformers or vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class LayerShape(NamedTuple):
    """The shape of the K/V of one layer, whatever the length of the prefix; equal to a plain tuple of the same numbers.

    Args:
        layer: The index of the layer.
        num_kv_heads: The number of KV heads in the whole model.
        key_size: The width of a key head.
        value_size: The width of a value head.
    """

    layer: int
    num_kv_heads: int
    key_size: int
    value_size: int


class LayerDifference(NamedTuple):
    """A layer whose K/V differ; `None` on the side that has no such layer."""

    layer: int
    adapter: LayerShape | None
    model: LayerShape | None

    def __str__(self) -> str:
        if self.adapter is None:
            return f"layer {self.layer} has no prefix in the adapter"
        if self.model is None:
            return f"layer {self.layer} has no KV cache in the model"
        return (
            f"layer {self.layer} has {self.adapter.num_kv_heads} KV heads of sizes {self.adapter[2:]}, the model has "
            f"{self.model.num_kv_heads} of sizes {self.model[2:]}"
        )


class StateShape(NamedTuple):
    """The shape of one state of a recurrent layer.

    Args:
        layer: The index of the layer.
        kind: `"conv"` or `"recurrent"`.
        number: Which of the layer's states of this kind, from 0.
        shape: Its shape in the whole model, without a batch dimension.
    """

    layer: int
    kind: str
    number: int
    shape: tuple[int, ...]


# A `LayerShape` or a plain tuple `(layer index, num_kv_heads, key_size, value_size)`.
LayerShapes = Iterable[tuple[int, int, int, int]]


def compare_layers(adapter: LayerShapes, model: LayerShapes, *, whole_model: bool = True) -> list[LayerDifference]:
    """Returns the layers that differ, in order of their index; none if the adapter fits.

    Args:
        adapter: The layers of the prefix.
        model: The layers of the model that have a KV cache.
        whole_model: Whether `model` lists all of them. If not, as in one pipeline stage, layers that only the adapter has
            are not compared.
    """
    ours, theirs = ({row[0]: LayerShape(*row) for row in rows} for rows in (adapter, model))
    indices = sorted(ours.keys() | theirs.keys() if whole_model else theirs.keys())
    pairs = [LayerDifference(index, ours.get(index), theirs.get(index)) for index in indices]
    return [pair for pair in pairs if pair.adapter != pair.model]


def compare_states(
    adapter: Iterable[StateShape], model: Iterable[StateShape], *, whole_model: bool = True
) -> list[str]:
    """Says which states of recurrent layers differ; nothing if the adapter fits.

    An adapter without any states fits every model: its recurrent layers start from zero.

    Args:
        adapter: The states of the prefix.
        model: The states of the model's recurrent layers.
        whole_model: Whether `model` lists all of them. If not, as in one pipeline stage, states that only the adapter has
            are not compared.
    """
    ours, theirs = ({row[:3]: row for row in rows} for rows in (adapter, model))
    found = []
    for key in sorted(ours.keys() | theirs.keys() if whole_model else theirs.keys()) if ours else ():
        mine, other = ours.get(key), theirs.get(key)
        layer, kind, _ = key
        if mine is None:
            found.append(f"layer {layer} has no {kind} state in the adapter")
        elif other is None:
            found.append(f"layer {layer} has no {kind} state in the model")
        elif mine.shape != other.shape:
            found.append(f"layer {layer} has a {kind} state {list(mine.shape)}, the model has {list(other.shape)}")
    return found


def layers_in_words(found: Sequence[LayerDifference]) -> list[str]:
    """Says what `compare_layers` found: which layers only one side has, or else the first layer of another shape."""
    without_prefix = [each.layer for each in found if each.adapter is None]
    without_cache = [each.layer for each in found if each.model is None]
    if without_prefix or without_cache:
        return [
            f"the layers with a KV cache differ (without a prefix: {without_prefix}, without a cache: {without_cache})"
        ]
    return [str(found[0])] if found else []


def other_base_model(adapter: str, base_model_name_or_path: str | None, found: Iterable[str]) -> str:
    """Returns the sentence for an adapter that does not fit.

    Args:
        adapter: The subject, such as `"Prefix adapter 'x'"`.
        base_model_name_or_path: What the adapter was trained on, if recorded.
        found: The differences, one phrase each.
    """
    trained_on = base_model_name_or_path or "name not recorded"
    return f"{adapter} was trained on another base model ({trained_on}): {'; '.join(found)}."
