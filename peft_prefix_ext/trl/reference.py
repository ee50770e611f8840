"""The reference policy of a trainer with a KL penalty."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_prefix_ext.config import PrefixExtConfig


def with_frozen_reference(model: PreTrainedModel, config: PrefixExtConfig) -> PeftModel:
    """Returns a model with a prefix, for a trainer whose reference policy is that prefix as it is now.

    TRL's trainers take the base model *without* the prefix as the reference where they get `peft_config=`: then the penalty
    pulls away from what the prefix starts as, and is not zero at the first step. Where they get a `PeftModel`, they keep a
    frozen copy of its adapter.

    Args:
        model: The base model.
        config: The config of the prefix.
    """
    return get_peft_model(model, config)
