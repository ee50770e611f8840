"""Verifies an adapter on its base model: everything that a server relies on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PreTrainedModel

from peft_prefix_ext.checkpoint.base_adapters import are_alike, model_with
from peft_prefix_ext.checkpoint.context import changed_sources, text_hash
from peft_prefix_ext.checkpoint.format import STOCK_TYPES, PrefixCheckpoint
from peft_prefix_ext.conversion.sources import check_fits, read_source
from peft_prefix_ext.conversion.stock_peft import import_from_peft

NUM_TOKENS = 16


@torch.no_grad()
def verify(source: str | Path | PrefixCheckpoint, base_model: PreTrainedModel) -> Iterator[str]:
    """Runs all checks and yields one sentence for each that passes.

    At the end it warns of what has changed since the prefix was made from a context: the chat template of the base model's
    tokenizer, and the files that the context was read from.

    Raises:
        ValueError: At the first check that fails, with what is wrong in one sentence.
    """
    # Imported late: the type is registered with PEFT once it is imported, but not while one of our modules is.
    from peft import PeftModel

    from peft_prefix_ext.tuner.other_adapters import active_base_adapters

    prefix = read_source(source)
    p, num_layers = prefix.num_virtual_tokens, len(prefix.layers)
    states = f", states of {len(prefix.states)} recurrent layers" if prefix.states else ""
    yield f"the file is valid: {p} virtual tokens in {num_layers} layers{states}, all finite"

    check_fits(prefix, base_model)
    compared = "architecture and shapes" if prefix.base_fingerprint else "shapes (the adapter records no architecture)"
    present = active_base_adapters(base_model)
    if not are_alike(prefix.base_adapters, present):
        raise ValueError(
            f"The prefix in {prefix.path} was trained on {model_with(prefix.base_adapters)}, and this is "
            f"{model_with(present)}."
        )
    yield f"the base model fits: it has the {compared} that the adapter was trained with"

    tokens = torch.arange(NUM_TOKENS, device=base_model.device)[None] % base_model.config.get_text_config().vocab_size
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if base_model.config.is_encoder_decoder else {})}
    alone = base_model.eval()(**inputs).logits.float()
    with TemporaryDirectory() as folder:
        path = prefix.path if prefix.peft_type not in STOCK_TYPES else import_from_peft(prefix, folder, base_model).path
        model = PeftModel.from_pretrained(base_model, path)
    used = read_source(model)
    for (index, kind, on_disk), (*_, in_use) in zip(prefix.tensors(), used.tensors(), strict=True):
        if not torch.equal(on_disk.to(in_use.dtype), in_use):
            raise ValueError(f"The model does not use the {kind} of layer {index} that is in {prefix.path}.")
    yield f"the model loads it and uses exactly the K/V{' and states' if prefix.states else ''} on disk"

    logits = model(**inputs).logits.float()
    if not logits.isfinite().all():
        raise ValueError(f"With the prefix in {prefix.path} the logits are NaN or Inf.")
    change = float((logits - alone).abs().max())
    if change == 0:
        raise ValueError(f"The prefix in {prefix.path} does not change the logits of {type(base_model).__name__}.")
    yield f"it works: the logits of {NUM_TOKENS} tokens are finite and change by up to {change:.3g}"
    for sentence in _changes(prefix, base_model):
        warnings.warn(sentence, stacklevel=3)  # past the frame of `no_grad`


def _changes(prefix: PrefixCheckpoint, base_model: PreTrainedModel) -> Iterator[str]:
    """Yields one sentence for each part of the recorded context that is another one now."""
    for name in changed_sources(prefix.context):
        yield (
            f"{name} has changed since the prefix in {prefix.path} was made from it: make the prefix again if it should know "
            "the new text."
        )
    recorded = prefix.context.get("chat_template_sha256")
    if recorded is not None and (now := _chat_template(base_model)) is not None and text_hash(now) != recorded:
        yield (
            f"The tokenizer of {base_model.name_or_path} has another chat template than the one that the prefix in "
            f"{prefix.path} was made with, and goes on with: make the prefix again if chats should follow the new one."
        )


def _chat_template(base_model: PreTrainedModel) -> str | None:
    """Returns the chat template of the base model's tokenizer, if there is one."""
    if not base_model.name_or_path:
        return None
    try:
        template = AutoTokenizer.from_pretrained(base_model.name_or_path).get_chat_template()
    except (OSError, ValueError):
        return None
    return str(template)
