"""The tiny configs of models that read images or audio beside text, and the inputs that their processors make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from helpers.gemma3n_vision import VisionConfig
from helpers.multimodal_inputs import (
    BEGIN,
    END,
    MEDIA,
    OTHER_MEDIA,
    crops,
    gemma3_pixels,
    gemma3n_audio,
    gemma4_patches,
    pixels,
    qwen2_audio,
    qwen_patches,
    sized_pixels,
    voxtral_audio,
)

VOCABULARY = 128
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
    "vision_config": VisionConfig(hidden_size=32, vocab_size=4, vocab_offset=120),
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
        pixels,
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
        sized_pixels,
    ),
    "idefics3": Multimodal(_idefics("idefics3_vision"), 4, crops),
    "smolvlm": Multimodal(_idefics("smolvlm_vision"), 4, crops),
    "internvl": Multimodal(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_seq_length": 4,
            "vision_feature_layer": -1,
            **_IMAGE,
        },
        4,
        pixels,
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
        pixels,
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
        qwen_patches,
    ),
    "qwen2_5_vl": Multimodal(
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **_QWEN_TOKENS,
        },
        4,
        qwen_patches,
    ),
    "qwen3_vl": Multimodal(_qwen3_vl(), 4, qwen_patches),
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
        qwen_patches,
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
        gemma3_pixels,
    ),
    "gemma3n": Multimodal({**_GEMMA3N, **_IMAGE, "audio_token_id": OTHER_MEDIA}, 4, pixels),
    "gemma3n:audio": Multimodal({**_GEMMA3N, "image_token_id": OTHER_MEDIA, "audio_token_id": MEDIA}, 4, gemma3n_audio),
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
        gemma4_patches,
    ),
    "qwen2_audio": Multimodal(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "audio_config": _AUDIO,
            "audio_token_index": MEDIA,
        },
        4,
        qwen2_audio,
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
        voxtral_audio,
    ),
}
