"""Where a prefix is read from, and the base model that it belongs to."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import PrefixCheckpoint
from peft_prefix_ext.checkpoint.hub import resolve
from peft_prefix_ext.checkpoint.reader import read_prefix

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The config fields that an adapter keeps when its type changes.
KEPT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def read_source(source: str | Path | PrefixCheckpoint | PeftModel, adapter_name: str | None = None) -> PrefixCheckpoint:
    """Reads a prefix from a folder or Hub repository, or from an adapter of a live `PeftModel`.

    Args:
        source: The folder, the repository (`owner/name[/folder][@revision]`), the model, or a checkpoint that was read.
        adapter_name: The adapter of a live model; its active one by default.
    """
    if isinstance(source, PrefixCheckpoint):
        return source
    if isinstance(source, (str, Path)):
        return read_prefix(resolve(source))
    name = adapter_name or source.active_adapter
    with TemporaryDirectory() as folder:
        source.save_pretrained(folder, selected_adapters=[name])
        return read_prefix(folder if name == "default" else Path(folder) / name)


def check_fits(prefix: PrefixCheckpoint, base_model: PreTrainedModel) -> tuple[dict[int, str], dict[str, Any]]:
    """Returns the attention modules of the base model by layer index, and its fingerprint.

    Raises:
        PrefixCheckpointError: If the prefix was trained on another base model.
    """
    from peft_prefix_ext.base_model.compatibility import check_layers
    from peft_prefix_ext.base_model.layers import probe_model
    from peft_prefix_ext.injection.decoder_hook import without_prefixes

    with without_prefixes(base_model):
        probed = probe_model(base_model)
    layers = [layer for layer in probed.layers if layer.attention in prefix.attentions.values()]
    check_layers(prefix, base_model, probed._replace(layers=layers))
    return {layer.index: layer.module for layer in layers}, fingerprint(base_model.config)
