"""Which attention function a model runs (`attn_implementation`), and whether it takes flash attention's masks."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

# Implementations that need no test. Any other, such as a user's own, is tested on the model before it gets a prefix.
SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")


def attention_implementation(config: PreTrainedConfig) -> str:
    """Returns the name of the attention function that a model with this config runs."""
    name: str = config.get_text_config(decoder=True)._attn_implementation
    return name


def uses_flash(config: PreTrainedConfig) -> bool:
    """Whether a model with this config runs flash attention, or another function that takes the same masks."""
    name = attention_implementation(config)
    if name in SUPPORTED_IMPLEMENTATIONS or "flash" in name:
        return name not in SUPPORTED_IMPLEMENTATIONS
    return ALL_MASK_ATTENTION_FUNCTIONS.get(name) is flash_attention_mask
