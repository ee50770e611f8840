"""Tiny random models that read images or audio beside text, in float32, and prompts for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.multimodal_configs import MULTIMODAL, NUM_WORDS
from helpers.multimodal_inputs import BEGIN, END, MEDIA


def tiny_multimodal(name: str, attention: str = "sdpa", **text_config: object) -> PreTrainedModel:
    """Builds the model with weights large enough for media and attention to matter to its output."""
    torch.manual_seed(0)
    fields = copy.deepcopy(MULTIMODAL[name].config)
    fields["text_config"].update(text_config)
    config = CONFIG_MAPPING[name.partition(":")[0]](**fields)
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Gemma multiplies embeddings by the root of its width, which would drown what attention adds.
                parameter.normal_(std=0.05 if name.startswith("gemma") and "embed" in key else 0.15)
    return model.float().eval()


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns random token ids, none of which stands for media."""
    return torch.randint(2, NUM_WORDS, shape, generator=torch.Generator().manual_seed(seed))


def prompts(name: str, batch_size: int = 2) -> torch.Tensor:
    """Returns the token ids of texts with a picture or a recording in each, `[b, q]`."""
    middle = torch.tensor([BEGIN, *[MEDIA] * MULTIMODAL[name].num_media_tokens, END]).expand(batch_size, -1)
    return torch.cat([words(batch_size, 3, seed=1), middle, words(batch_size, 5, seed=2)], dim=1)


def media(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what a processor makes of the media of `prompts`, also behind text or padding, beside the token ids."""
    return MULTIMODAL[name].inputs(ids)


def positions(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the `position_ids` of a batch as a caller gives them, `[b, q]`, or with the axes of the rotary embeddings first."""
    mask = inputs["attention_mask"]
    inner: Any = model.base_model
    if hasattr(inner, "get_rope_index") and "image_grid_thw" in inputs:
        grids, kinds = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
        return inner.get_rope_index(
            inputs["input_ids"], image_grid_thw=grids, mm_token_type_ids=kinds, attention_mask=mask
        )[0]
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
