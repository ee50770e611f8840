"""`PrefixExtConfig`: every choice of a prefix, in PEFT's config format."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from peft import PeftConfig
from transformers.activations import ACT2FN

from peft_prefix_ext.checkpoint import FORMAT_VERSION
from peft_prefix_ext.peft_type import PREFIX_EXT

# Every initialisation, with the argument that says what it starts from.
INITS: dict[str, str | None] = {"random": None, "text": "init_text", "exemplars": "init_exemplars"}
# What does not go where an adapter is shared.
PRIVATE = ("init_exemplars",)
REPARAMS = ("none", "mlp")


@dataclass
class PrefixExtConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`PrefixExtModel`].

    Args:
        num_virtual_tokens (`int`):
            The length p of the prefix. Real tokens start at position p.
        init (`str`):
            Where the prefix starts: `"random"` (normal with `init_std`), or the K/V that a prefill of the frozen base
            model writes for `"text"` (the words of `init_text`) or `"exemplars"` (the rows of `init_exemplars`). Tokens
            are repeated up to the length of the prefix when they are too few, and cut when they are too many; the
            beginning-of-sequence token, where the tokenizer adds one, comes first and once.
        init_text (`str`, *optional*):
            The words of the task, for `init="text"`.
        init_exemplars (`Iterable`, *optional*):
            Rows of the task's data set, for `init="exemplars"`, packed in their order: a list or a `datasets.Dataset` of
            strings or of dicts with `text`, `prompt` and `completion`, or `messages`. Never saved.
        init_std (`float`):
            The standard deviation for `init="random"`.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer of `init_text` or `init_exemplars`; the base model's when not given.
        reparam (`str`):
            `"none"` trains the K/V themselves, `"mlp"` trains an MLP that yields them. Any initialisation is exact at
            step 0.
        reparam_residual (`bool`):
            Whether the MLP's output is added to the initial K/V (its last layer starts at zero), or is the K/V (its last
            layer starts at the least squares solution, which needs a `reparam_hidden_size` well above the number of
            tokens that train).
        reparam_latent_size (`int`):
            The size of the MLP's trainable input, one row per virtual token.
        reparam_hidden_size (`int`):
            The width of the MLP.
        reparam_num_layers (`int`):
            The depth of the MLP: its number of hidden layers.
        reparam_activation (`str`):
            The activation of the MLP, any name that transformers knows.
        reparam_dropout (`float`):
            The dropout after each hidden layer of the MLP.
        reparam_shared_trunk (`bool`):
            Whether all layers of the model share the MLP's hidden layers, or each has its own.
        reparam_joint_kv (`bool`):
            Whether keys and values share the MLP's hidden layers.
        prefix_dropout (`float`):
            The dropout of the elements of the K/V that train, drawn once for each forward pass, for all rows of a batch
            alike.
        num_frozen_tokens (`int`):
            How many virtual tokens, from the first, stay at their initial K/V (an attention sink).
        layers_to_train (`list[int]`, *optional*):
            The indices of the layers whose K/V train, all by default. The others stay at their initial K/V.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model, apart from the prefix, to train and save as a whole, such as the head of a
            classifier. An adapter with such modules cannot be served.
        save_reparam (`bool`):
            Whether `save_pretrained` keeps the MLP beside the K/V, so that training can go on from the checkpoint.
            Serving never needs it.
        init_report (`str`, *optional*):
            Recorded by the tuner, not to be set: what the prefix was initialised from.
        prefix_layers (`list[dict]`, *optional*):
            Recorded when saved, not to be set: the index, attention module and K/V shapes of each layer.
        base_fingerprint (`dict`, *optional*):
            Recorded when saved, not to be set: the architecture of the base model.
        format_version (`int`):
            Recorded when saved, not to be set: the version of the checkpoint format.
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "The length of the prefix."})
    init: str = field(default="random", metadata={"help": f"Where the prefix starts, one of {tuple(INITS)}."})
    init_text: str | None = field(default=None, metadata={"help": "The words of the task, for `init='text'`."})
    init_exemplars: Iterable[Any] | None = field(
        default=None, repr=False, compare=False, metadata={"help": "Rows of a data set, for `init='exemplars'`."}
    )
    init_std: float = field(default=0.02, metadata={"help": "The standard deviation for `init='random'`."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer of text and rows; the base model's when not given."}
    )
    reparam: str = field(default="none", metadata={"help": f"How the K/V are parameterized, one of {REPARAMS}."})
    reparam_latent_size: int = field(default=64, metadata={"help": "The size of the MLP's trainable input."})
    reparam_hidden_size: int = field(default=256, metadata={"help": "The width of the MLP."})
    reparam_num_layers: int = field(default=1, metadata={"help": "The number of hidden layers of the MLP."})
    reparam_activation: str = field(default="tanh", metadata={"help": "The activation of the MLP."})
    reparam_dropout: float = field(default=0.0, metadata={"help": "The dropout after each hidden layer of the MLP."})
    reparam_residual: bool = field(
        default=True, metadata={"help": "Whether the MLP's output is added to the initial K/V."}
    )
    reparam_shared_trunk: bool = field(default=True, metadata={"help": "Whether all layers share the MLP's trunk."})
    reparam_joint_kv: bool = field(default=True, metadata={"help": "Whether keys and values share the MLP's trunk."})
    prefix_dropout: float = field(default=0.0, metadata={"help": "The dropout of the elements of the K/V."})
    num_frozen_tokens: int = field(
        default=0, metadata={"help": "How many virtual tokens, from the first, stay at their initial K/V."}
    )
    layers_to_train: list[int] | None = field(
        default=None, metadata={"help": "The indices of the layers whose K/V train; all when not given."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train and save as a whole, such as a classifier."}
    )
    save_reparam: bool = field(default=True, metadata={"help": "Whether to save the MLP, to go on training."})
    init_report: str | None = field(
        default=None, metadata={"help": "Recorded by the tuner: what the prefix was initialised from."}
    )
    prefix_layers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Recorded when saved: index, module and K/V shapes of each layer."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Recorded when saved: the architecture of the base model."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "The version of the checkpoint format."})

    # PEFT's injection reads it from every config; the attention layers are found by a probe instead.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        import_module("peft_prefix_ext.model")  # registers with PEFT, for who imported this module alone
        self.peft_type = PREFIX_EXT
        # What the tuner learns about the base model. It becomes part of the dict that is saved, not of the live config,
        # so that one config object can be used for several models.
        self._recorded: dict[str, Any] = {}
        _check_at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        _check_one_of("init", self.init, tuple(INITS))
        self._check_sources()
        if not self.init_std >= 0:
            raise ValueError(f"`init_std` must be >= 0, got {self.init_std}.")
        _check_at_least("num_frozen_tokens", self.num_frozen_tokens, 0)
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(
                "`num_frozen_tokens` must be < `num_virtual_tokens`, got "
                f"{self.num_frozen_tokens} and {self.num_virtual_tokens}."
            )
        _check_one_of("reparam", self.reparam, REPARAMS)
        for name in ("reparam_latent_size", "reparam_hidden_size", "reparam_num_layers"):
            _check_at_least(name, getattr(self, name), 1)
        if self.reparam_activation not in ACT2FN:
            raise ValueError(f"`reparam_activation` must be one of {sorted(ACT2FN)}, got {self.reparam_activation!r}.")
        for name in ("reparam_dropout", "prefix_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        layers = self.layers_to_train
        if layers is not None and not (isinstance(layers, list) and all(type(index) is int for index in layers)):
            raise ValueError(f"`layers_to_train` must be a list of integers, got {layers!r}.")
        if layers == []:
            raise ValueError("`layers_to_train` must name at least one layer, got [].")

    @property
    def is_saved(self) -> bool:
        """Whether this config was read from a saved adapter, whose weights are about to be loaded."""
        return self.prefix_layers is not None

    def trains(self, layer_index: int) -> bool:
        """Whether the K/V of a layer train, by `layers_to_train`."""
        return self.layers_to_train is None or layer_index in self.layers_to_train

    def to_dict(self) -> dict[str, Any]:
        shared = copy.copy(self)
        for name in PRIVATE:
            setattr(shared, name, None)
        return {**super(PrefixExtConfig, shared).to_dict(), **self._recorded}

    def _check_sources(self) -> None:
        needed = INITS[self.init]
        for name in filter(None, INITS.values()):
            given = getattr(self, name) is not None
            if name == needed and not given and not self.is_saved:
                raise ValueError(f"`{name}` must be given when `init={self.init!r}`.")
            if name != needed and given:
                uses = " or ".join(f"`init={init!r}`" for init, source in INITS.items() if source == name)
                raise ValueError(f"`{name}` is only used with {uses}, got `init={self.init!r}`.")
        if isinstance(self.init_exemplars, (str, dict)) or not isinstance(self.init_exemplars, (Iterable, type(None))):
            raise ValueError(
                "`init_exemplars` must be rows, as a list or one split of a data set, got "
                f"{type(self.init_exemplars).__name__}."
            )


def _check_at_least(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}.")


def _check_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
