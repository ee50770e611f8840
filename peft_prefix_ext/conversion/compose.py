"""Concatenates several prefixes into one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_prefix_ext.checkpoint.base_adapters import are_alike, model_with
from peft_prefix_ext.checkpoint.compatibility import compare_layers
from peft_prefix_ext.checkpoint.fingerprint import differences
from peft_prefix_ext.checkpoint.format import LayerKV, PrefixCheckpoint
from peft_prefix_ext.checkpoint.writer import write_prefix
from peft_prefix_ext.conversion.sources import KEPT, check_fits, read_source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

POSITIONS = ("keep", "shift")


def compose(
    sources: Sequence[str | Path | PrefixCheckpoint | PeftModel],
    folder: str | Path,
    positions: str = "keep",
    base_model: PreTrainedModel | None = None,
) -> PrefixCheckpoint:
    """Concatenates prefixes of one base model (Eyuboglu et al. 2025, Cartridges, https://arxiv.org/abs/2506.06266).

    Real tokens start after all of them, at the sum of their lengths. `positions` decides where the keys are:

    - `"keep"`, as in the paper and in PEFT: the keys of each prefix stay at positions 0.., so that all prefixes overlap, and
      each is farther from the text than in training.
    - `"shift"`: the keys of each prefix are rotated by the lengths of those before it, as if its tokens had been read there.
      The last prefix is as far from the text as in training. Two prefixes of two texts act like the texts one after the
      other, except that the second was read without the first.

    Prefixes that were trained apart did not learn to share attention. Behind one another they collapse, to near chance in
    Cartridges at Scale (https://arxiv.org/abs/2606.04557), unless they were trained to stand beside others, as
    `prefix-ext distill --with` does: evaluate the result. Frozen tokens stay frozen only in the first prefix.

    Args:
        sources: Folders or Hub repositories of adapters, ours or stock PEFT's, checkpoints, or live `PeftModel`s.
        folder: The folder of the new `PREFIX_EXT` adapter; it is created if needed and may be one of `sources`.
        positions: `"keep"` or `"shift"`.
        base_model: The model they were trained on. Needed for `"shift"`, which measures the rotation of its keys (load it in
            float32 for exactness), and if all sources are stock adapters.

    Raises:
        ValueError: If the prefixes are of different base models, one has states of recurrent layers, or the keys of the model cannot be shifted.
    """
    if positions not in POSITIONS:
        raise ValueError(f"`positions` must be one of {POSITIONS}, got {positions!r}.")
    if isinstance(sources, (str, Path)) or not sources:
        raise ValueError(f"`sources` must be a list of prefixes, got {sources!r}.")
    if positions == "shift" and base_model is None:
        raise ValueError(
            "`base_model` must be given with `positions='shift'`: the rotation of the keys is measured on it."
        )
    prefixes = [read_source(source) for source in sources]
    for prefix in prefixes:
        if prefix.states:
            raise ValueError(
                f"The prefix in {prefix.path} has states of recurrent layers, which cannot be put behind one another: train "
                "prefixes to compose with `state_prefix=False`."
            )
    modules, base_fingerprint = _common_base(prefixes, base_model)
    parts, length = [], 0
    for prefix in prefixes:
        layers = prefix.layers
        if positions == "shift" and length:
            from peft_prefix_ext.initialization.key_rotation import KeyRotationError, shift

            assert base_model is not None
            try:
                layers = shift(base_model, layers, length)
            except KeyRotationError as error:
                raise ValueError(f"{error}: compose with `positions='keep'`.") from error
        parts.append(layers)
        length += prefix.num_virtual_tokens
    composed = {
        index: LayerKV(*(torch.cat(states, dim=1) for states in zip(*(part[index] for part in parts), strict=True)))
        for index in parts[0]
    }
    lengths = " + ".join(str(prefix.num_virtual_tokens) for prefix in prefixes)
    kept: dict[str, Any] = {name: prefixes[0].config.get(name) for name in KEPT}
    return write_prefix(
        folder,
        composed,
        modules,
        prefixes[0].attentions,
        **kept,
        base_fingerprint=base_fingerprint,
        base_adapters=[adapter._asdict() for adapter in prefixes[0].base_adapters],
        init_report=f"{length} virtual tokens: prefixes of {lengths} behind one another, positions {positions!r}",
        num_frozen_tokens=min(prefixes[0].config.get("num_frozen_tokens", 0), length - 1),
    )


def _common_base(
    prefixes: list[PrefixCheckpoint], base_model: PreTrainedModel | None
) -> tuple[dict[int, str], dict[str, Any]]:
    """Returns the attention modules by layer index, and the fingerprint, of the one base model of all prefixes."""
    first = prefixes[0]
    for other in prefixes[1:]:
        found = differences(first.base_fingerprint, other.base_fingerprint)
        if found or compare_layers(first.layer_shapes, other.layer_shapes):
            raise ValueError(
                f"The prefix adapters in {first.path} and {other.path} were trained on different base models "
                f"({first.base_model_name_or_path} and {other.base_model_name_or_path}): "
                f"{'; '.join(found) or 'their layers or K/V shapes differ'}."
            )
        if not are_alike(first.base_adapters, other.base_adapters):
            raise ValueError(
                f"The prefix adapters in {first.path} and {other.path} were trained on different models: "
                f"{model_with(first.base_adapters)}, and {model_with(other.base_adapters)}."
            )
        one, two = first.base_model_name_or_path, other.base_model_name_or_path
        if one and two and Path(one).name != Path(two).name:
            warnings.warn(
                f"The prefixes were trained on {one} and {two}: the architecture fits, but only the same weights give the same "
                "answers.",
                stacklevel=3,
            )
    if base_model is not None:
        fits = [check_fits(prefix, base_model) for prefix in prefixes]
        return fits[0]
    ours = next((prefix for prefix in prefixes if prefix.modules), None)
    if ours is None:
        raise ValueError(
            "`base_model` (`--base`) must be given: stock PEFT adapters do not say which attention modules they are for."
        )
    return ours.modules, ours.base_fingerprint
