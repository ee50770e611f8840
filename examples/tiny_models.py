"""Tiny random models that need no download: one that sees images, and one with recurrent layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GraniteMoeHybridConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ["<pad>", "<end>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
PAD, END, VISION_START, IMAGE, VISION_END, VIDEO = range(len(SPECIAL))
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endfor %}"
)
# The CPU engine has no kernel for heads smaller than 32.
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def save_vision_model(folder: Path, words: list[str]) -> Path:
    """Saves a Qwen2.5-VL whose vocabulary is `words`, with its processor."""
    tokenizer = word_tokenizer(words)
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "hidden_size": 64,
            "out_hidden_size": TEXT["hidden_size"],
            "intermediate_size": 96,
            "depth": 2,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=images.size),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return _save(AutoModelForImageTextToText, config, folder)


def save_hybrid(folder: Path, words: list[str]) -> Path:
    """Saves a Granite 4 hybrid, three Mamba-2 layers and one of attention, whose vocabulary is `words`."""
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(folder)
    config = GraniteMoeHybridConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        layer_types=["mamba", "mamba", "attention", "mamba"],
        shared_intermediate_size=128,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="rope",
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        tie_word_embeddings=False,
    )
    return _save(AutoModelForCausalLM, config, folder)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each word."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
    )


def _save(auto_class: Any, config: Any, folder: Path) -> Path:
    """Saves a random model, with weights large enough for attention and images to matter to its output."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.float().save_pretrained(folder)
    return folder
