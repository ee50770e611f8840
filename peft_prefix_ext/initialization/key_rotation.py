"""Moves keys to other positions, by a rotation that is measured on the model itself.

Rotary embeddings rotate pairs of entries of a key by angles that grow with its position, so a rotation R(n) that depends
neither on the token nor on m moves a key from position m to m + n. Which entries form pairs, which of them rotate and how
fast differs between architectures, and in Gemma 3 or SmolLM3 between layers. So R(n) is fitted to keys that the model
computes for single tokens at positions 0 and n, and verified with other tokens at another position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.base_model.layers import record_layers
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.injection.decoder_hook import without_prefixes

NUM_TOKENS = 8
EXACT = 1e-6  # relative error of float32 keys


class KeyRotationError(ValueError):
    """No rotation moves the keys of a model to other positions."""


class Rotation(NamedTuple):
    """A rotation of pairs of entries: the indices of both entries and the angle in radians, `[num_pairs]` each."""

    first: torch.Tensor
    second: torch.Tensor
    angle: torch.Tensor

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns the rotated keys, `[..., head_dim]` in float64."""
        keys = keys.double()
        pairs = torch.complex(keys[..., self.first], keys[..., self.second])
        pairs = pairs * torch.polar(torch.ones_like(self.angle), self.angle)
        rotated = keys.clone()
        rotated[..., self.first], rotated[..., self.second] = pairs.real, pairs.imag
        return rotated


def shift(model: PreTrainedModel, layers: Mapping[int, LayerKV], offset: int) -> dict[int, LayerKV]:
    """Returns the K/V of tokens that stand `offset` positions later, `[num_kv_heads, num_virtual_tokens, head_dim]` each.

    Exact up to rounding in the dtype of the model. A negative offset moves them to earlier positions.

    Raises:
        KeyRotationError: If no rotation moves the keys of the model (learned absolute positions, or a rotation that depends
            on the length of the text).
        ValueError: If the model has no such positions.
    """
    name = describe(model)
    if model.config.is_encoder_decoder:
        raise KeyRotationError(f"{name} takes no positions, so the rotation of its keys cannot be measured")
    last = max(layer.key.shape[1] for layer in layers.values()) - 1
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    start, end = max(0, -offset), max(0, offset)
    if limit and max(start, end) + last >= limit:
        raise ValueError(
            f"{name} has {limit} positions, which {max(start, end) + last + 1} virtual tokens do not fit into."
        )
    before, after = _measure_kv(model, start), _measure_kv(model, end)
    checks_before, checks_after = _measure_kv(model, start + last, seed=1), _measure_kv(model, end + last, seed=1)
    shifted = {}
    for index, layer in layers.items():
        moved = []
        # Multi-head latent attention caches the part that rotates as values, and the other part as keys.
        for number, state in enumerate(layer):
            rotation = _fit_rotation(before[index][number], after[index][number])
            if not _is_close(rotation(checks_before[index][number]), checks_after[index][number]):
                raise KeyRotationError(
                    f"{name} does not place what layer {index} caches by a rotation that could move it {offset} positions"
                )
            moved.append(rotation(state.cpu()).to(state.device, state.dtype))
        shifted[index] = LayerKV(*moved)
    return shifted


def _measure_kv(model: PreTrainedModel, position: int, seed: int = 0) -> dict[int, LayerKV]:
    """Returns the K/V of random tokens, each alone at `position`, by layer: `[num_kv_heads, NUM_TOKENS, head_dim]` each."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (NUM_TOKENS,), generator=generator).tolist()
    at_position = torch.full((1, 1), position, device=model.device)
    with without_prefixes(model):
        runs = [record_layers(model, [token], position_ids=at_position) for token in tokens]
    return {
        layers[0].index: LayerKV(
            *(torch.cat(states, dim=1).cpu() for states in zip(*(layer.kv for layer in layers), strict=True))
        )
        for layers in zip(*runs, strict=True)
    }


def _fit_rotation(before: torch.Tensor, after: torch.Tensor) -> Rotation:
    """Returns the rotation that best maps the keys `before` to those `after`, `[num_kv_heads, num_tokens, head_dim]` each."""
    # Without pairs, for keys that do not rotate.
    no_pairs = torch.empty(0, dtype=torch.long)
    best, least = Rotation(no_pairs, no_pairs, torch.empty(0, dtype=torch.double)), _relative_error(before, after)
    if least < EXACT:
        return best
    for first, second in _pairings(before.shape[-1]):
        pairs = [torch.complex(keys[..., first], keys[..., second]) for keys in (before.double(), after.double())]
        rotation = Rotation(first, second, (pairs[0].conj() * pairs[1]).sum(dim=(0, 1)).angle())
        error = _relative_error(rotation(before), after)
        if error < least:
            best, least = rotation, error
        if least < EXACT:
            break
    return best


def _pairings(head_dim: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the known conventions: all entries rotate, or the first or last ones; pairs are halves apart or adjacent."""
    for size in range(head_dim - head_dim % 2, 0, -2):
        for start in sorted({0, head_dim - size}):
            entries = torch.arange(start, start + size)
            yield entries[: size // 2], entries[size // 2 :]
            yield entries[::2], entries[1::2]


def _is_close(predicted: torch.Tensor, actual: torch.Tensor) -> bool:
    return _relative_error(predicted, actual) < (1e-5 if actual.dtype == torch.float32 else 2e-2)


def _relative_error(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    return float((predicted - actual.double()).norm() / actual.double().norm())
