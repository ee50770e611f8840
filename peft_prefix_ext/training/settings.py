"""`TrainSettings`: what `prefix-ext train` decides beyond TRL's `SFTConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peft_prefix_ext.settings import check_settings, setting

INITS = ("auto", "exemplars", "text", "adapter", "vocab", "random")
REPARAMS = ("mlp", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training. Each is an option of `prefix-ext train` as well, whose help describes it."""

    num_virtual_tokens: int = setting(64, "the length of the prefix", least=1)
    init: str = setting(
        "auto",
        "what the prefix starts as; by default as `--init-text` or `--init-adapter` if given, else as rows of the data",
        choices=INITS,
    )
    init_text: str | None = setting(None, "the description of the task that the prefix starts as")
    init_adapter: str | None = setting(None, "another prefix for the same base model that this one starts as")
    reparam: str = setting("mlp", "train an MLP whose output is the prefix, or the prefix itself", choices=REPARAMS)
    num_frozen_tokens: int = setting(0, "how many tokens, from the first, are not trained", least=0)
    token_dropout: float = setting(0.0, "the probability that a virtual token is masked in a training step")
    prefix_args: str | None = setting(None, "further fields of PrefixExtConfig as JSON, such as '{\"init_std\": 0.1}'")
    held_out: float = setting(
        0.1, "the share of the rows to hold out, or their number, if the data has no validation or test split"
    )
    dtype: str = setting(
        "auto", "the dtype of the base model; by default float32 on a CPU, else its own", choices=DTYPES
    )
    load_in_4bit: bool = setting(False, "quantize the base model to 4 bits as QLoRA does; needs bitsandbytes")
    patience: int = setting(3, "how many evaluations without progress until training stops", least=1)
    num_samples: int = setting(3, "how many answers to held-out rows are shown in the end", least=0)
    max_new_tokens: int = setting(64, "the length of the longest of them, in tokens", least=1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.init == "text" and not self.init_text:
            raise ValueError("`init` is 'text', so give `init_text`.")
        if self.init == "adapter" and not self.init_adapter:
            raise ValueError("`init` is 'adapter', so give `init_adapter`.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
