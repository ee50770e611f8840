"""Whether a prefix was made for the base model at hand, by its architecture and the shapes of its layers."""

from __future__ import annotations

from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, shapes_of


def check_layers(prefix: PrefixCheckpoint, base_model: PreTrainedModel, layers: list[ProbedLayer]) -> None:
    """Checks that a prefix fits the attention layers of a base model.

    Args:
        prefix: The prefix as it was read from disk.
        base_model: The base model.
        layers: Its attention layers, as `probe_layers` returns them.

    Raises:
        PrefixCheckpointError: If the prefix was trained on another architecture, or a layer has K/V of another shape.
    """
    prefix.check_base(fingerprint(base_model.config), shapes_of({layer.index: layer.kv for layer in layers}))
