"""Which class of prefix layer a decoder's attention module gets."""

from __future__ import annotations

from torch import nn

from peft_prefix_ext.architectures.alibi import BiasedPrefix
from peft_prefix_ext.architectures.chunked import ChunkedPrefix
from peft_prefix_ext.architectures.column_distances import ColumnPrefix, uses_column_distances
from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.injection.layer import PrefixExtLayer


def select_layer_class(attention: nn.Module, probed: ProbedLayer) -> type[PrefixExtLayer]:
    """Returns the class of the prefix layer for an attention module of a decoder-only model.

    `BiasedPrefix` is the default: without a bias it does what `PrefixExtLayer` does.
    """
    if probed.is_chunked:
        return ChunkedPrefix
    if uses_column_distances(attention):
        return ColumnPrefix
    return BiasedPrefix
