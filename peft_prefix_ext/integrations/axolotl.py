"""A plugin for Axolotl: with it, `adapter: prefix_ext` trains a prefix.

    plugins:
      - peft_prefix_ext.integrations.axolotl.PrefixExtPlugin
    adapter: prefix_ext
    prefix_ext:
      num_virtual_tokens: 64
      init_text: Describe the restaurant in one sentence.

Axolotl imports this module; nothing else does.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator

from peft_prefix_ext.integrations.options import config_of, task_type_of

ADAPTER = "prefix_ext"


class PrefixExtArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML."""

    prefix_ext: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"description": "The prefix: fields of PrefixExtConfig."}
    )

    @model_validator(mode="before")
    @classmethod
    def check_prefix(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuses what cannot be trained, before the base model is loaded."""
        if data.get("adapter") != ADAPTER:
            if data.get("prefix_ext") is not None:
                raise ValueError(f"`prefix_ext:` has options of a prefix, so set `adapter: {ADAPTER}`.")
            return data
        config_of(data.get("prefix_ext"))
        if data.get("load_in_4bit") or data.get("load_in_8bit"):
            raise ValueError(
                f"Axolotl does not quantize the base model for `adapter: {ADAPTER}`: take `load_in_4bit` and `load_in_8bit` "
                "out, or name a base model that is saved quantized."
            )
        return data


class PrefixExtPlugin(BasePlugin):
    """Makes and loads the adapter of `adapter: prefix_ext`."""

    def get_input_args(self) -> str:
        return f"{PrefixExtArgs.__module__}.{PrefixExtArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig | None] | None:
        """Adds the prefix to the base model, or loads that of `lora_model_dir`.

        Args:
            model: The base model.
            cfg: Axolotl's configuration.
            inference: Whether the prefix is not trained.
            config_only: Whether the trainer will add the prefix itself, as TRL's `DPOTrainer` does.

        Returns:
            The model, or the config if it is all that is wanted; `None` if another adapter is configured. Axolotl would save
            a config that comes with a model at once, over that of an adapter that is there already.
        """
        if cfg.adapter != ADAPTER:
            return None
        options = cfg.prefix_ext.to_dict() if cfg.prefix_ext else {}
        config = config_of(options, task_type_of(model))
        if config_only:
            return None, config
        more = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            more["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            prefixed = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **more)
        else:
            prefixed = get_peft_model(model, config, **more)
        if not cfg.local_rank:
            prefixed.print_trainable_parameters()
        return prefixed, None
