"""A tuner for ms-swift: with it, `--tuner_type prefix_ext` trains a prefix.

A file for `--external_plugins` registers it:

    from peft_prefix_ext.integrations.ms_swift import register

    register(num_virtual_tokens=64, init_text="Describe the restaurant in one sentence.")
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from peft_prefix_ext.integrations.options import config_of

TUNER = "prefix_ext"
# PEFT's task type for each of ms-swift's; the others train no head that PEFT knows.
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "generative_reranker": "CAUSAL_LM",
    "decision": "CAUSAL_LM",
    "seq_cls": "SEQ_CLS",
    "reranker": "SEQ_CLS",
}


def register(name: str = TUNER, **options: Any) -> type[PeftTuner]:
    """Makes `--tuner_type prefix_ext` train a prefix.

    Args:
        name: The tuner type.
        options: Fields of `PrefixExtConfig`.

    Returns:
        The class that ms-swift makes, saves and loads adapters with.

    Raises:
        ValueError: If an option is unknown, or has a wrong value.
    """
    config_of(options)

    class PrefixExtTuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> nn.Module:
            return get_peft_model(model, config_of(options, _TASKS.get(args.task_type)))

        @staticmethod
        def save_pretrained(
            model: nn.Module,
            save_directory: str,
            state_dict: dict[str, Any] | None = None,
            safe_serialization: bool = True,
            **kwargs: Any,
        ) -> None:
            # `PeftTuner` leaves out the state dict, in which DeepSpeed and FSDP have gathered what is trained.
            if isinstance(model, PeftModel):
                kwargs.setdefault("selected_adapters", ["default"])
            save: Any = model.save_pretrained
            save(save_directory, state_dict=state_dict, safe_serialization=safe_serialization, **kwargs)

    tuners_map[name] = PrefixExtTuner
    return PrefixExtTuner
