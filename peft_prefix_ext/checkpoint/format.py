"""The on-disk format of a prefix: names, shapes and errors that training and serving share.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. A `PREFIX_EXT` adapter holds two float
tensors for each layer that owns a KV cache, `[num_kv_heads, num_virtual_tokens, head_dim]` each: keys after rotary
embedding at positions 0..p-1, and values. Keys and values may differ in width, layers may differ from each other:

    base_model.model.<attention module>.prefix_ext.prefix_ext_key
    base_model.model.<attention module>.prefix_ext.prefix_ext_value

The config lists them in `prefix_layers` by layer index. In an encoder-decoder model the first rows are the decoder's
self-attention; rows with `"attention": "cross"` or `"encoder"` follow with higher indices. Readers ignore all other
`prefix_ext` tensors, such as the reparameterization that is kept for further training. Stock PEFT `PREFIX_TUNING` and
`CARTRIDGE` adapters hold one flat `prompt_embeddings`, `[num_virtual_tokens, num_layers * 2 * num_kv_heads * head_dim]`.

Format version 2 adds the states that recurrent layers start from. The config lists them in `prefix_states`, a row for each
tensor with `index`, `module`, `kind`, `number`, `shape` and `dtype`; a layer may have K/V and states. `kind` is `"conv"`, the
last inputs of a causal convolution, `[channels, kernel_size - 1]`, oldest first, or `"recurrent"`, in the layout of
transformers' cache: `[num_heads, head_k_dim, head_v_dim]` for a gated delta rule, `[num_heads, head_dim, state_size]` for
Mamba-2. `number` counts the states of one kind in a layer, from 0:

    base_model.model.<mixer module>.prefix_ext.prefix_ext_conv_state_<number>
    base_model.model.<mixer module>.prefix_ext.prefix_ext_recurrent_state_<number>

An adapter without states is written in version 1, so that older releases read it.

This package needs torch and safetensors only. It never imports peft, transformers or vllm, and never unpickles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter
from peft_prefix_ext.checkpoint.compatibility import (
    LayerShape,
    LayerShapes,
    StateShape,
    compare_layers,
    compare_states,
    other_base_model,
)
from peft_prefix_ext.checkpoint.fingerprint import differences

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# The version of an adapter without states, and of one with states.
FORMAT_VERSION, STATES_VERSION = FORMAT_VERSIONS = (1, 2)
# Kinds of attention: the decoder's self-attention (the only kind in a decoder-only model), the decoder's cross-attention,
# the encoder's self-attention.
DECODER, CROSS, ENCODER = ATTENTIONS = ("decoder", "cross", "encoder")
STOCK_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
# The K/V of a prefix, the initial K/V that a reparameterization adds to, the states, and the parameters of the
# reparameterization. Any other tensor in the file belongs to the base model.
_PREFIX_TENSOR = re.compile(
    r"base_model\.model\.(.+\.prefix_ext\.prefix_ext_((init_)?(key|value)|(conv|recurrent)_state_\d+)"
    r"|prefix_ext\.prefix_ext_reparam(_encoder)?\..+)"
)
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PrefixCheckpointError(ValueError):
    """An adapter is missing, malformed or made for another base model."""


class PrefixNotFoundError(PrefixCheckpointError):
    """There is no adapter at this path."""


class LayerKV(NamedTuple):
    """The prefix K/V of one layer: `[num_kv_heads, num_virtual_tokens, head_dim]` each."""

    key: torch.Tensor
    value: torch.Tensor


class LayerState(NamedTuple):
    """What one recurrent layer starts from.

    Args:
        conv: The last inputs of its causal convolutions, `[channels, kernel_size - 1]` each, oldest first.
        recurrent: Its recurrent states in the layout of transformers' cache, without a batch dimension.
    """

    conv: tuple[torch.Tensor, ...] = ()
    recurrent: tuple[torch.Tensor, ...] = ()

    def numbered(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yields `(kind, number, tensor)` for each state."""
        for kind, tensors in zip(self._fields, self, strict=True):
            for number, tensor in enumerate(tensors):
                yield kind, number, tensor


@dataclass(frozen=True)
class PrefixCheckpoint:
    """One prefix, read and checked.

    Args:
        path: The folder it was read from.
        peft_type: `PREFIX_EXT`, `PREFIX_TUNING` or `CARTRIDGE`.
        num_virtual_tokens: p, at least 1.
        layers: K/V by layer index, on the CPU, in the dtype on disk.
        base_model_name_or_path: The model that the adapter was trained on, as PEFT records it.
        base_fingerprint: The architecture of that model, see `fingerprint.py`; empty in a stock adapter.
        digest: SHA-256 of the weights file, in hex; empty if only its header was read.
        modules: The attention module of each layer, by layer index; empty in a stock adapter.
        base_adapters: The adapters that the base model had in training, such as LoRA; the prefix is wrong without them.
        config: The whole of `adapter_config.json`.
        states: The states of recurrent layers by layer index, on the CPU, in the dtype on disk; empty if the adapter has none.
        state_modules: The module of each recurrent layer, by layer index.
        largest: The largest absolute value of all tensors; `None` if only the header of the weights was read, in which case
            the tensors are on the meta device.
    """

    path: Path
    peft_type: str
    num_virtual_tokens: int
    layers: dict[int, LayerKV]
    base_model_name_or_path: str | None
    base_fingerprint: dict[str, Any]
    digest: str
    modules: dict[int, str]
    base_adapters: tuple[BaseAdapter, ...]
    config: dict[str, Any]
    states: dict[int, LayerState] = field(default_factory=dict)
    state_modules: dict[int, str] = field(default_factory=dict)
    largest: float | None = None

    def tensors(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """Yields `(layer index, kind, tensor)` for all K/V and states."""
        for index, layer in self.layers.items():
            for kind, tensor in zip(layer._fields, layer, strict=True):
                yield index, kind, tensor
        for index, state in self.states.items():
            for kind, _, tensor in state.numbered():
                yield index, f"{kind} state", tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, _, tensor in self.tensors())

    @property
    def context(self) -> dict[str, Any]:
        """What is recorded of the context that the prefix stands for, see `context` of `PrefixExtConfig`; empty if nothing."""
        context = self.config.get("context")
        return context if isinstance(context, dict) else {}

    @property
    def chat_template(self) -> str | None:
        """The chat template of the messages behind a prefix that stands for the opening of a chat."""
        template = self.context.get("chat_template")
        return template if isinstance(template, str) else None

    @property
    def attentions(self) -> dict[int, str]:
        """The kind of attention of each layer, one of `ATTENTIONS`, by layer index."""
        kinds = {row["index"]: row.get("attention", DECODER) for row in self.config.get("prefix_layers") or []}
        return {index: kinds.get(index, DECODER) for index in self.layers}

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the base model is an encoder-decoder model."""
        trained_on_one = self.base_fingerprint.get("is_encoder_decoder") or is_stock_encoder_decoder(self.config)
        return bool(trained_on_one) or set(self.attentions.values()) != {DECODER}

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """The shape of each layer, in order of the layer index."""
        return shapes_of(self.layers)

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """The shape of each state, in order of the layer index."""
        return state_shapes_of(self.states)

    def check_base(
        self,
        base_fingerprint: dict[str, Any],
        layers: LayerShapes | None = None,
        states: Iterable[StateShape] | None = None,
    ) -> None:
        """Raises `PrefixCheckpointError` if the prefix was trained on another base model.

        Args:
            base_fingerprint: The fingerprint of the model at hand.
            layers: The shapes of its layers with a KV cache; `None` to compare the architectures only.
            states: The shapes of the states of its recurrent layers; `None` to leave them out.
        """
        found = differences(self.base_fingerprint, base_fingerprint)
        if not found and layers is not None:
            found = [
                f"layer {layer} has keys and values {self._kv_shapes(ours)} in the adapter and {self._kv_shapes(theirs)} in "
                "the model"
                for layer, ours, theirs in compare_layers(self.layer_shapes, layers)[:1]
            ]
        if not found and states is not None:
            found = compare_states(self.state_shapes, states)[:1]
        if found:
            raise PrefixCheckpointError(
                other_base_model(f"The prefix adapter in {self.path}", self.base_model_name_or_path, found)
            )

    def _kv_shapes(self, shape: LayerShape | None) -> tuple[list[int], list[int]] | None:
        if shape is None:
            return None
        key, value = ([shape.num_kv_heads, self.num_virtual_tokens, size] for size in shape[2:])
        return key, value


def shapes_of(layers: Mapping[int, LayerKV]) -> tuple[LayerShape, ...]:
    """Returns the shapes of K/V given by layer index, in order of the index."""
    return tuple(
        LayerShape(index, kv.key.shape[0], kv.key.shape[2], kv.value.shape[2]) for index, kv in sorted(layers.items())
    )


def state_shapes_of(states: Mapping[int, LayerState]) -> tuple[StateShape, ...]:
    """Returns the shapes of states given by layer index, in order of the index."""
    return tuple(
        StateShape(index, kind, number, tuple(tensor.shape))
        for index, state in sorted(states.items())
        for kind, number, tensor in state.numbered()
    )


def state_table(states: Mapping[int, LayerState], modules: Mapping[int, str]) -> list[dict[str, Any]]:
    """Returns the rows of `prefix_states` in the config: one for each state, in order of layer index, kind and number."""
    return [
        {
            "index": index,
            "module": modules[index],
            "kind": kind,
            "number": number,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for index, state in sorted(states.items())
        for kind, number, tensor in state.numbered()
    ]


def layer_key(module: str, kind: str) -> str:
    """Returns the tensor name of a layer's `kind` (`"key"` or `"value"`) in the file."""
    return f"base_model.model.{module}.prefix_ext.prefix_ext_{kind}"


def state_key(module: str, kind: str, number: int) -> str:
    """Returns the tensor name of a recurrent layer's state of `kind` (`"conv"` or `"recurrent"`) in the file."""
    return f"base_model.model.{module}.prefix_ext.prefix_ext_{kind}_state_{number}"


def is_of_prefix(name: str) -> bool:
    """Whether a tensor in the file belongs to the prefix and not to the base model."""
    return _PREFIX_TENSOR.fullmatch(name) is not None


def magnitude(tensor: torch.Tensor) -> float:
    """Returns the largest absolute value in a tensor; NaN if any value is NaN.

    Ten times as fast as `isfinite().all()`, which takes several passes.
    """
    if not tensor.numel():
        return 0.0
    # Both are NaN if any value is NaN.
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    return max(-low, high)


def is_stock_encoder_decoder(config: dict[str, Any]) -> bool:
    """Whether an `adapter_config.json` is that of a stock PEFT prefix for an encoder-decoder model."""
    return config["peft_type"] in STOCK_TYPES and config.get("num_transformer_submodules") == 2
