"""Whether a prefix was made for the base model at hand, by its architecture and the shapes of its layers."""

from __future__ import annotations

from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedModel
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint, shapes_of, state_shapes_of


def check_layers(prefix: PrefixCheckpoint, base_model: PreTrainedModel, probed: ProbedModel) -> None:
    """Checks that a prefix fits the layers of a base model.

    Args:
        prefix: The prefix as it was read from disk.
        base_model: The base model.
        probed: Its layers, as `probe_model` returns them.

    Raises:
        PrefixCheckpointError: If the prefix was trained on another architecture, or a layer has K/V or states of another
            shape.
    """
    layers = shapes_of({layer.index: layer.kv for layer in probed.layers})
    states = state_shapes_of({each.index: each.states for each in probed.states})
    prefix.check_base(fingerprint(base_model.config), layers, states)
