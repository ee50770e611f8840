"""A vision tower for tiny Gemma 3n models, whose own is a model of timm, and timm is not among the requirements of the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class VisionConfig(Gemma3nVisionConfig):
    model_type = "gemma3n_vision_without_timm"


class VisionTower(PreTrainedModel):
    """One convolution."""

    config_class = VisionConfig
    _supports_sdpa = True

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.convolution = nn.Conv2d(3, config.hidden_size, kernel_size=8, stride=8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.convolution(pixel_values))


AutoModel.register(VisionConfig, VisionTower)
