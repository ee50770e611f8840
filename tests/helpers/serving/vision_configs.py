"""Configs of tiny vision-language models: sizes, special tokens, and the processor of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.serving.vision_processors import (
    internvl_processor,
    pixtral_processor,
    qwen2_5_vl_processor,
    qwen3_vl_processor,
)

VOCABULARY, IMAGE, START, END, VIDEO, AUDIO = 160, 140, 141, 142, 143, 144
CONTEXT = 256
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # The CPU engine has no kernel for smaller heads.
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_QWEN_VISION = {
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_WORDS = {IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>", VIDEO: "<|video_pad|>"}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@dataclass(frozen=True)
class VisionModel:
    """How to make one of these models.

    Args:
        config: Makes its config.
        marker: The tokens that stand for one picture in a prompt.
        words: Its special tokens by id.
        tokenizer: Further arguments of its tokenizer.
        processor: Makes its processor from its tokenizer; None if pictures are not tested.
    """

    config: Callable[[], Any]
    marker: tuple[int, ...] = (IMAGE,)
    words: Any = None
    tokenizer: Any = None
    processor: Callable[[Any], Any] | None = None


def _config(name: str, text: dict[str, Any], vision: dict[str, Any], **own: Any) -> Callable[[], Any]:
    return lambda: CONFIG_MAPPING[name](text_config={**_TEXT, **text}, vision_config=vision, **own)


def _qwen3_vision(**own: Any) -> dict[str, Any]:
    return {**_QWEN_VISION, "depth": 3, "patch_size": 16, "num_position_embeddings": 16, **own}


VISION_MODELS: dict[str, VisionModel] = {
    "qwen2_5_vl": VisionModel(
        _config(
            "qwen2_5_vl",
            {"rope_parameters": _MROPE},
            {**_QWEN_VISION, "depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
            **_QWEN_IDS,
            tie_word_embeddings=False,
        ),
        (START, IMAGE, END),
        _QWEN_WORDS,
        processor=qwen2_5_vl_processor,
    ),
    "qwen3_vl": VisionModel(
        _config(
            "qwen3_vl",
            {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
            _qwen3_vision(deepstack_visual_indexes=[0, 1]),
            **_QWEN_IDS,
            tie_word_embeddings=False,
        ),
        (START, IMAGE, END),
        _QWEN_WORDS,
        processor=qwen3_vl_processor,
    ),
    # With recurrent layers.
    "qwen3_5": VisionModel(
        _config(
            "qwen3_5",
            {
                "layer_types": ["linear_attention", "full_attention"] * 2,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 32,
                "linear_value_head_dim": 32,
                "rope_parameters": {
                    **_MROPE,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                    "partial_rotary_factor": 0.25,
                },
            },
            _qwen3_vision(),
            **_QWEN_IDS,
            tie_word_embeddings=False,
        ),
        (START, IMAGE, END),
        _QWEN_WORDS,
        processor=qwen3_vl_processor,
    ),
    "mistral3": VisionModel(
        _config(
            "mistral3",
            {"model_type": "mistral", "sliding_window": None},
            {**_VISION, "model_type": "pixtral", "head_dim": 32, "image_size": 112, "rope_theta": 10000.0},
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            spatial_merge_size=2,
        ),
        words={IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"},
        processor=pixtral_processor,
    ),
    "llava": VisionModel(
        _config(
            "llava",
            {"model_type": "llama"},
            {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
    ),
    "idefics3": VisionModel(
        _config(
            "idefics3",
            {"model_type": "llama"},
            {**_VISION, "model_type": "idefics3"},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
    ),
    "smolvlm": VisionModel(
        _config(
            "smolvlm",
            {"model_type": "llama"},
            {**_VISION, "model_type": "smolvlm_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
    ),
    "gemma3": VisionModel(
        _config(
            "gemma3",
            {"sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
            _VISION,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            tie_word_embeddings=False,
        ),
    ),
    # With layers that share K/V, and heads of two sizes.
    "gemma4": VisionModel(
        _config(
            "gemma4",
            {
                "sliding_window": 24,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            {
                **_VISION,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "patch_size": 16,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
                "default_output_length": 4,
            },
            audio_config=None,
            image_token_id=IMAGE,
            boi_token_id=START,
            eoi_token_id=END,
            vision_soft_tokens_per_image=4,
        ),
        words={IMAGE: "<|image|>", START: "<|image>", END: "<image|>", VIDEO: "<|video|>", AUDIO: "<|audio|>"},
        tokenizer={"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
    ),
    "internvl": VisionModel(
        _config(
            "internvl",
            {"model_type": "qwen2"},
            {**_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
            image_token_id=IMAGE,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
        words={IMAGE: "<IMG_CONTEXT>", START: "<img>", END: "</img>", VIDEO: "<video>"},
        tokenizer={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        processor=internvl_processor,
    ),
    # With attention in chunks.
    "llama4": VisionModel(
        _config(
            "llama4",
            {
                "attention_chunk_size": 64,
                "floor_scale": 8,
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "attn_temperature_tuning": False,
            },
            {
                **_VISION,
                "intermediate_size": 256,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "vision_output_dim": 64,
            },
            image_token_index=IMAGE,
        ),
    ),
}
