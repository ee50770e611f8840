"""Moving keys to later positions, by a rotation that is measured on the model itself.

Rotary embeddings turn pairs of a key's entries by angles that grow with its position, so that a key at position m becomes
the one at position m + n by a rotation R(n) that does not depend on m or the token. Which entries are pairs, which of
them turn at all, and how fast, is for every architecture (and, in Gemma 3 or SmolLM3, every layer) another matter, and is
therefore read off keys that the model made: of single tokens, once at position 0 and once at position n. Tokens that
were not used for it, at another position, are the proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from peft_prefix_ext.base_model.describe import describe
from peft_prefix_ext.checkpoint.format import LayerKV

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS = 8
EXACT = 1e-6  # relative, of float32 keys after their arithmetic


class Rotation(NamedTuple):
    """Turns pairs of entries: `[num_pairs]` each, the indices of both entries and the angle in radians."""

    first: torch.Tensor
    second: torch.Tensor
    angle: torch.Tensor

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns the turned keys, `[..., head_dim]` in float64."""
        turned = keys.double()
        pairs = torch.complex(turned[..., self.first], turned[..., self.second])
        pairs = pairs * torch.polar(torch.ones_like(self.angle), self.angle)
        turned = turned.clone()
        turned[..., self.first], turned[..., self.second] = pairs.real, pairs.imag
        return turned


def shift(model: PreTrainedModel, layers: Mapping[int, LayerKV], offset: int) -> dict[int, LayerKV]:
    """Returns K/V, `[num_kv_heads, num_virtual_tokens, head_dim]` each, as of tokens that stand `offset` positions later.

    Exact up to float rounding on a model in float32; on one in a lower precision up to that precision.

    Raises:
        ValueError: If the model's keys do not turn with their position, as with learned absolute positions, or turn by how
            long the text is, or if it has no such positions.
    """
    name = describe(model)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is not given positions, at which its keys could be measured: compose with `positions='keep'`."
        )
    last = max(layer.key.shape[1] for layer in layers.values()) - 1
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and offset + last >= limit:
        raise ValueError(f"{name} has {limit} positions, which {offset + last + 1} virtual tokens do not fit into.")
    before, after = _record(model, 0), _record(model, offset)
    checks_before, checks_after = _record(model, last, seed=1), _record(model, offset + last, seed=1)
    shifted = {}
    for index, layer in layers.items():
        moved = []
        # Latent attention caches what turns as the values, and what does not as the keys.
        for number, state in enumerate(layer):
            rotation = _measure(before[index][number], after[index][number])
            if not _is_close(rotation(checks_before[index][number]), checks_after[index][number]):
                raise ValueError(
                    f"{name} does not place what layer {index} caches by a rotation that could move it {offset} positions: "
                    "compose with `positions='keep'`."
                )
            moved.append(rotation(state).to(state.dtype))
        shifted[index] = LayerKV(*moved)
    return shifted


def _record(model: PreTrainedModel, position: int, seed: int = 0) -> dict[int, LayerKV]:
    """Returns `[num_kv_heads, NUM_TOKENS, head_dim]` by layer, of random tokens that each stand alone at `position`."""
    from peft_prefix_ext.base_model.layers import record_layers
    from peft_prefix_ext.injection.decoder_hook import without_prefixes

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


def _measure(before: torch.Tensor, after: torch.Tensor) -> Rotation:
    """Returns the rotation that best takes the keys `before` to those `after`, `[num_kv_heads, num_tokens, head_dim]`."""
    # The one of no pairs, for what does not turn.
    nothing = torch.empty(0, dtype=torch.long)
    best, least = Rotation(nothing, nothing, torch.empty(0, dtype=torch.double)), _relative_error(before, after)
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
    """Yields the conventions there are: all entries turn, or the first or last of them, in halves or next to each other."""
    for size in range(head_dim - head_dim % 2, 0, -2):
        for start in sorted({0, head_dim - size}):
            entries = torch.arange(start, start + size)
            yield entries[: size // 2], entries[size // 2 :]
            yield entries[::2], entries[1::2]


def _is_close(predicted: torch.Tensor, actual: torch.Tensor) -> bool:
    return _relative_error(predicted, actual) < (1e-5 if actual.dtype == torch.float32 else 2e-2)


def _relative_error(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    return float((predicted - actual.double()).norm() / actual.double().norm())
