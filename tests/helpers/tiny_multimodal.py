"""Tiny random models that read images or audio beside text, in float32, and the inputs that they take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForMultimodalLM, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
# Tokens that stand for media, and those around them.
MEDIA, BEGIN, END, OTHER_MEDIA = 100, 101, 102, 103
NUM_WORDS = 99  # words are below
WINDOW = 12  # shorter than a prompt

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING = {**_TEXT, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_PER_LAYER = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
_IMAGE = {"image_token_id": MEDIA}
# Rotary embeddings of three axes: time, height and width.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_TOKENS = {**_IMAGE, "video_token_id": OTHER_MEDIA, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_QWEN_VISION = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_VISION = {**_QWEN_VISION, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 8,
}
_GEMMA3N_AUDIO = {
    "vocab_offset": 124,
    "vocab_size": 4,
    "input_feat_size": 16,
    "hidden_size": 32,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 1,
    "conf_attention_context_left": 5,
    "conf_attention_chunk_size": 4,
    "conf_reduction_factor": 1,
    "sscp_conv_channel_size": (8, 4),
}


class _VisionConfig(Gemma3nVisionConfig):
    model_type = "gemma3n_vision_without_timm"


class _VisionTower(PreTrainedModel):
    """One convolution instead of Gemma 3n's own tower, which is a model of timm, and timm is not among the requirements."""

    config_class = _VisionConfig
    _supports_sdpa = True

    def __init__(self, config: _VisionConfig) -> None:
        super().__init__(config)
        self.convolution = nn.Conv2d(3, config.hidden_size, kernel_size=8, stride=8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.convolution(pixel_values))


AutoModel.register(_VisionConfig, _VisionTower)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# What a processor makes of one picture or recording for each row of the token ids.


def _pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": _normal(len(ids), 3, 16, 16)}


def _crops(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": _normal(len(ids), 1, 3, 16, 16)}


def _sized_pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**_pixels(ids), "image_sizes": torch.tensor([[16, 16]] * len(ids))}


def _gemma3_pixels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**_pixels(ids), "token_type_ids": (ids == MEDIA).long()}


def _gemma4_patches(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).reshape(1, 16, 2)
    return {
        "pixel_values": _normal(len(ids), 16, 48).sigmoid(),
        "image_position_ids": places.expand(len(ids), -1, -1),
        "mm_token_type_ids": (ids == MEDIA).long(),
    }


def _qwen_patches(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    grids = torch.tensor([[1, 4, 4]] * len(ids))
    patches = _normal(16 * len(ids), 96)
    return {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": (ids == MEDIA).int()}


def _qwen2_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 8, 16), "feature_attention_mask": torch.ones(len(ids), 16).long()}


def _voxtral_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 8, 16)}


def _gemma3n_audio(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": _normal(len(ids), 16, 16), "input_features_mask": torch.ones(len(ids), 16).bool()}


class Multimodal(NamedTuple):
    """A model type, or one that a name with a colon stands for.

    Args:
        config: The fields of its tiny config.
        num_media_tokens: How many tokens stand for one picture or recording.
        inputs: The media of a batch, one picture or recording for each row of the token ids, `[b, q]`.
    """

    config: dict[str, Any]
    num_media_tokens: int
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def _qwen3_vl(**text: Any) -> dict[str, Any]:
    rope = {**_ROPE, "mrope_interleaved": True}
    return {"text_config": {**_TEXT, "rope_parameters": rope, **text}, "vision_config": _QWEN3_VISION, **_QWEN_TOKENS}


def _idefics(vision: str) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": vision, **_VISION},
        "scale_factor": 2,
        "pad_token_id": 0,
        **_IMAGE,
    }


_GEMMA3N = {
    "text_config": {**_SLIDING, **_PER_LAYER, "laurel_rank": 8},
    "vision_config": _VisionConfig(hidden_size=32, vocab_size=4, vocab_offset=120),
    "vision_soft_tokens_per_image": 4,
    "audio_config": _GEMMA3N_AUDIO,
    "audio_soft_tokens_per_image": 4,
}

MULTIMODAL: dict[str, Multimodal] = {
    "llava": Multimodal(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
            "image_token_index": MEDIA,
            "vision_feature_layer": -1,
        },
        16,
        _pixels,
    ),
    "mistral3": Multimodal(
        {
            "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", "head_dim": 16, "rope_theta": 10000.0, **_VISION},
            "image_token_index": MEDIA,
            "vision_feature_layer": -1,
            "spatial_merge_size": 2,
        },
        4,
        _sized_pixels,
    ),
    "idefics3": Multimodal(_idefics("idefics3_vision"), 4, _crops),
    "smolvlm": Multimodal(_idefics("smolvlm_vision"), 4, _crops),
    "internvl": Multimodal(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_seq_length": 4,
            "vision_feature_layer": -1,
            **_IMAGE,
        },
        4,
        _pixels,
    ),
    "llama4": Multimodal(
        {
            "text_config": {
                **_TEXT,
                "attention_chunk_size": WINDOW,
                "floor_scale": 8,
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "attn_temperature_tuning": False,
            },
            "vision_config": {
                **_VISION,
                "intermediate_size": 128,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
            "image_token_index": MEDIA,
        },
        4,
        _pixels,
    ),
    "qwen2_vl": Multimodal(
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {
                "embed_dim": 32,
                "hidden_size": 64,
                "depth": 2,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **_QWEN_TOKENS,
        },
        4,
        _qwen_patches,
    ),
    "qwen2_5_vl": Multimodal(
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **_QWEN_TOKENS,
        },
        4,
        _qwen_patches,
    ),
    "qwen3_vl": Multimodal(_qwen3_vl(), 4, _qwen_patches),
    "qwen3_5": Multimodal(
        _qwen3_vl(
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        ),
        4,
        _qwen_patches,
    ),
    "gemma3": Multimodal(
        {
            "text_config": {**_SLIDING, "query_pre_attn_scalar": 16},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": MEDIA,
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
        },
        4,
        _gemma3_pixels,
    ),
    "gemma3n": Multimodal({**_GEMMA3N, **_IMAGE, "audio_token_id": OTHER_MEDIA}, 4, _pixels),
    "gemma3n:audio": Multimodal(
        {**_GEMMA3N, "image_token_id": OTHER_MEDIA, "audio_token_id": MEDIA}, 4, _gemma3n_audio
    ),
    "gemma4": Multimodal(
        {
            "text_config": {**_SLIDING, **_PER_LAYER, "global_head_dim": 32},
            "vision_config": {
                **{key: _VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "boi_token_id": BEGIN,
            "eoi_token_id": END,
            "vision_soft_tokens_per_image": 4,
            **_IMAGE,
        },
        4,
        _gemma4_patches,
    ),
    "qwen2_audio": Multimodal(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "audio_config": _AUDIO,
            "audio_token_index": MEDIA,
        },
        4,
        _qwen2_audio,
    ),
    "voxtral": Multimodal(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "max_source_positions": 8,
            },
            "audio_token_id": MEDIA,
        },
        4,
        _voxtral_audio,
    ),
}


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
