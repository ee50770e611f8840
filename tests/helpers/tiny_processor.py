"""A tiny vision-language model with its processor in a folder, as from the Hub, that reads any text and any picture."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers.tiny import tiny_tokenizer
from helpers.tiny_multimodal import tiny_multimodal

_TEMPLATE = (
    "{% for message in messages %}<s>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
)


def save_vision_model(folder: Path) -> None:
    """Saves a tiny LLaVA, whose processor needs no torchvision."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = tiny_multimodal("llava", vocab_size=len(tokenizer))
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
