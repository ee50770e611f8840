"""Whether a prefix was made for the base model at hand, by its architecture and the shapes of its layers."""

from __future__ import annotations

from transformers import PreTrainedModel

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint


def check_layers(prefix: PrefixCheckpoint, base_model: PreTrainedModel, layers: list[ProbedLayer]) -> None:
    """Checks that a prefix fits the attention layers of a base model.

    Args:
        prefix: The prefix as it was read from disk.
        base_model: The base model.
        layers: Its attention layers, as `probe_layers` returns them.

    Raises:
        ValueError: If the prefix was trained on another architecture, or a layer has K/V of another shape.
    """
    prefix.check_base(fingerprint(base_model.config))
    expected = {layer.index: layer.shapes(prefix.num_virtual_tokens) for layer in layers}
    found = {index: (list(kv.key.shape), list(kv.value.shape)) for index, kv in prefix.layers.items()}
    if found != expected:
        index = min(index for index in found.keys() | expected.keys() if found.get(index) != expected.get(index))
        raise ValueError(
            f"The prefix adapter in {prefix.path} was trained on another base model "
            f"({prefix.base_model_name_or_path or 'name not recorded'}): layer {index} has keys and values {found.get(index)} "
            f"in the adapter and {expected.get(index)} in {type(base_model).__name__}."
        )
