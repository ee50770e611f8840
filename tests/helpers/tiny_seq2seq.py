"""Tiny random encoder-decoder models, in float32 and untied, so that outputs differ wherever K/V differ."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from helpers.tiny import VOCABULARY

_T5_LIKE = {"d_model": 64, "d_kv": 24, "d_ff": 96, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
_BART_LIKE = {
    "d_model": 64,
    **{
        f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in (("ffn_dim", 96), ("layers", 3))
    },
    **{f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")},
}

ENCODER_DECODERS: dict[str, tuple[str, dict]] = {
    "t5": ("T5Config", _T5_LIKE),  # d_kv * num_heads != d_model
    "mt5": ("MT5Config", _T5_LIKE),
    "bart": ("BartConfig", _BART_LIKE),
    "mbart": ("MBartConfig", _BART_LIKE),
    "pegasus": ("PegasusConfig", _BART_LIKE),
    "m2m_100": ("M2M100Config", _BART_LIKE),
    "marian": ("MarianConfig", _BART_LIKE),
    "blenderbot": ("BlenderbotConfig", _BART_LIKE),
    "blenderbot-small": ("BlenderbotSmallConfig", _BART_LIKE),
    "plbart": ("PLBartConfig", _BART_LIKE),
}

# Their encoders attend in ways of their own, to which no K/V can be given.
OTHER_ENCODERS: dict[str, tuple[str, dict]] = {
    "longt5": ("LongT5Config", _T5_LIKE),
    "led": (
        "LEDConfig",
        {
            **_BART_LIKE,
            "attention_window": 8,
            "max_encoder_position_embeddings": 128,
            "max_decoder_position_embeddings": 128,
        },
    ),
    "bigbird_pegasus": ("BigBirdPegasusConfig", {**_BART_LIKE, "attention_type": "original_full"}),
    "pegasus_x": ("PegasusXConfig", {**_BART_LIKE, "num_global_tokens": 4, "block_size": 8}),
}


def tiny_encoder_decoder(name: str, seed: int = 0, attention: str = "sdpa", **overrides: object) -> PreTrainedModel:
    """Builds the model without dropout, with weights large enough for attention to matter to its output."""
    torch.manual_seed(seed)
    config_class, own = {**ENCODER_DECODERS, **OTHER_ENCODERS}[name]
    values = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 1,
        **dict.fromkeys(("dropout", "dropout_rate", "activation_dropout", "attention_dropout"), 0.0),
        **own,
        **overrides,
    }
    config = getattr(transformers, config_class)(**values)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.float().eval()
