"""The options of a prefix as PEFT-Factory reads them. It takes the first config class that this module has."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_prefix_ext import config


@dataclass
class PrefixExtArguments(config.PrefixExtConfig):
    """`PrefixExtConfig` with types that transformers' `HfArgumentParser` takes, which wants one type for each field."""

    init_adapter: list[str] | None = field(default=None, metadata={"help": "Other prefixes, for `init='average'`."})
    trainable_token_indices: list[int] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are also trained."}
    )
