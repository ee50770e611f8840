"""Tiny random vision-language models with tokenizers and image processors of their own, made without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from helpers.serving.vision_configs import IMAGE, VISION_MODELS, VOCABULARY


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words, `w3 w4 ...`, and the model's special tokens."""
    model = VISION_MODELS[name]
    special = model.words or {IMAGE: "<image>"}
    words = ["<pad>", "<s>", "<unk>", *(f"w{index}" for index in range(3, VOCABULARY))]
    for index, word in special.items():
        words[index] = word
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    own = {} if model.tokenizer is None else {"extra_special_tokens": model.tokenizer}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=_chat(name),
        **own,
    )
    fast.add_special_tokens(
        {"additional_special_tokens": list(special.values())},
        **({"replace_extra_special_tokens": False} if own else {}),
    )
    return fast


def _chat(name: str) -> str:
    """Returns a chat template that joins the parts of all messages, with the model's marker for each picture."""
    model = VISION_MODELS[name]
    marker = " ".join((model.words or {IMAGE: "<image>"})[index] for index in model.marker)
    return (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        f"{{{{ part['text'] }}}} {{% else %}}{marker} {{% endif %}}{{% endfor %}}{{% endfor %}}"
    )


def vision_model(name: str) -> PreTrainedModel:
    """Builds the model in float32, with weights large enough for attention and pictures to matter to its output."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(VISION_MODELS[name].config(), attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Gemma multiplies embeddings by the root of its width, which would drown what attention adds.
                parameter.normal_(std=0.05 if name.startswith("gemma") and "embed" in key else 0.15)
    return model.float().eval()


def processor(name: str) -> Any:
    """Returns the processor of a model whose pictures are tested."""
    make = VISION_MODELS[name].processor
    assert make is not None
    return make(tokenizer(name))


def save(name: str, folder: Path) -> Path:
    """Saves a model, its tokenizer and its processor, if it has one."""
    vision_model(name).save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    if VISION_MODELS[name].processor is not None:
        processor(name).save_pretrained(folder)
    return folder


def picture(seed: int, size: int = 112) -> Image.Image:
    """Returns a square picture of noise; `size` in pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))
