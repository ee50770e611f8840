"""What processors make of media for the models of `multimodal_configs`: a picture or recording for each row of the token ids."""

from __future__ import annotations

import torch

# The tokens that stand for media, and those before and after them.
MEDIA, BEGIN, END, OTHER_MEDIA = 100, 101, 102, 103


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": _normal(len(ids), 3, 16, 16)}


def crops(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": _normal(len(ids), 1, 3, 16, 16)}


def sized_pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**pixels(ids), "image_sizes": torch.tensor([[16, 16]] * len(ids))}


def gemma3_pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**pixels(ids), "token_type_ids": (ids == MEDIA).long()}


def gemma4_patches(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).reshape(1, 16, 2)
    return {
        "pixel_values": _normal(len(ids), 16, 48).sigmoid(),
        "image_position_ids": places.expand(len(ids), -1, -1),
        "mm_token_type_ids": (ids == MEDIA).long(),
    }


def qwen_patches(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    grids = torch.tensor([[1, 4, 4]] * len(ids))
    patches = _normal(16 * len(ids), 96)
    return {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": (ids == MEDIA).int()}


def qwen2_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 8, 16), "feature_attention_mask": torch.ones(len(ids), 16).long()}


def voxtral_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 8, 16)}


def gemma3n_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 16, 16), "input_features_mask": torch.ones(len(ids), 16).bool()}
