"""`PrefixExtConfig`: the configuration of a prefix, in PEFT's format."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from os import PathLike
from typing import Any

from peft import PeftConfig
from transformers.activations import ACT2FN

from peft_prefix_ext.checkpoint.format import ATTENTIONS, CROSS, DECODER, ENCODER, FORMAT_VERSION
from peft_prefix_ext.dataset_rows import are_rows
from peft_prefix_ext.peft_type import PREFIX_EXT

# Each value of `init`, with the argument that it needs.
INITS: dict[str, str | None] = {
    "random": None,
    "vocab": None,
    "tokens": "init_token_ids",
    "text": "init_text",
    "exemplars": "init_exemplars",
    "kv": "init_kv",
    "adapter": "init_adapter",
    "average": "init_adapter",
}
AUTO = "auto"
# Data of the user, which is never saved with the adapter.
UNSAVED_FIELDS = ("init_exemplars", "init_kv")
# Fields that came later, and are left out of a config that they say nothing in: the adapter is the same file as before.
LATER_FIELDS = {"state_prefix": True, "prefix_states": None, "min_learning_rate": None}
ADAPTER_PARTS = ("all", "keys")
REPARAMS = ("none", "mlp")


@dataclass
class PrefixExtConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`PrefixExtModel`].

    Args:
        num_virtual_tokens (`int`):
            The length p of the prefix. Real tokens start at position p.
        init (`str`):
            What to initialize the prefix from. Four options are token ids, whose K/V the frozen base model computes:
            `"vocab"` (drawn at random), `"tokens"` (`init_token_ids`), `"text"` (`init_text`) and `"exemplars"` (the rows of
            `init_exemplars`). The others are K/V: `"random"` (normal with `init_std`), `"kv"` (`init_kv`), `"adapter"`
            (another prefix, `init_adapter`) and `"average"` (the mean of several). The default `"auto"` uses the argument
            that is given, or else `"random"`. Random values follow `torch.manual_seed`.
        init_token_ids (`list[int]`, *optional*):
            The token ids for `init="tokens"`: repeated if shorter than the prefix, truncated if longer.
        init_text (`str`, *optional*):
            The task description for `init="text"`. It follows the beginning-of-sequence token, if the tokenizer adds one. It
            is repeated if shorter than the prefix, truncated if longer.
        init_chat_template (`bool`):
            Whether to render `init_text` as a system message with the tokenizer's chat template. Only the text within the
            message is repeated or truncated, so that the prefix is one complete message. If the template alone fills the
            prefix, its end is truncated.
        init_exemplars (`Iterable`, *optional*):
            Dataset rows for `init="exemplars"`, packed in their order: a list, one split of `datasets` or a data frame, of
            strings or of dicts with `text`, `prompt` and `completion`, or `messages`. They follow the beginning-of-sequence
            token, if the tokenizer adds one; each row but `messages` ends with the end-of-sequence token. The last row is
            truncated; too few rows are repeated. Never saved.
        init_kv (`Cache`, `list` or `dict`, *optional*):
            The K/V for `init="kv"`, with keys after rotary embedding at positions 0..p-1: the `past_key_values` of one
            sequence, a list of (K, V) pairs with one for each attention layer, or a dict of them by layer index, each
            `[num_kv_heads, num_virtual_tokens, head_dim]`, optionally with a batch dimension of 1. Never saved.
        init_kv_next_position (`int`, *optional*):
            The position at which the text after `init_kv` goes on; `num_virtual_tokens` by default. Keys are moved by the
            difference. Needed for models that give an image fewer positions than tokens (Qwen-VL), and for K/V that were
            chosen from a longer text.
        init_adapter (`str` or `list[str]`, *optional*):
            The folder or Hub repository (`owner/name[@revision]`) of another prefix of the same base model for
            `init="adapter"`, or of several for `init="average"`: a `PREFIX_EXT` adapter, or stock PEFT's `PREFIX_TUNING` or
            `CARTRIDGE`. A longer prefix is truncated, a shorter one is refused.
        init_adapter_part (`str`):
            `"all"`, or `"keys"` for the keys only, which transfer between tasks (arXiv:2508.17032), with random values of
            `init_std`.
        init_std (`float`):
            The standard deviation of random K/V and states.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer for text, rows and vocabulary; that of the base model by default.
        reparam (`str`):
            `"mlp"` trains an MLP whose output is the K/V, `"none"` trains the K/V themselves, which needs a learning rate
            about ten times as high, see `min_learning_rate`. Both start exactly at the initial K/V. States of recurrent
            layers have no MLP; beside one they are scaled so that its learning rate fits them.
        reparam_residual (`bool`):
            Whether the output of the MLP is added to the initial K/V (its last layer is initialized to zero). Otherwise it is
            the K/V (its last layer is initialized by least squares, which needs a `reparam_hidden_size` well above the
            number of trainable tokens).
        reparam_latent_size (`int`):
            The size of the MLP's trainable input, one row per virtual token.
        reparam_hidden_size (`int`):
            The hidden size of the MLP.
        reparam_num_layers (`int`):
            The number of hidden layers of the MLP.
        reparam_activation (`str`):
            The activation function of the MLP, any name that transformers knows.
        reparam_dropout (`float`):
            The dropout probability after each hidden layer of the MLP.
        reparam_shared_trunk (`bool`):
            Whether all layers of the model share the hidden layers of the MLP.
        reparam_joint_kv (`bool`):
            Whether keys and values share the hidden layers of the MLP.
        prefix_dropout (`float`):
            The dropout probability of the elements of the trainable K/V and states. One mask is drawn per forward pass and
            shared by all rows of a batch.
        token_dropout (`float`):
            The probability that a whole virtual token is masked in a forward pass while training (CT-KV, arXiv:2507.04221).
            One draw per forward pass holds for all rows of a batch and all layers; the encoder of an encoder-decoder model
            has its own. Nothing is rescaled, and positions stay. `num_frozen_tokens` are never masked, and states of
            recurrent layers have no tokens. Not supported with flex attention.
        num_frozen_tokens (`int`):
            The number of virtual tokens, from the first, that keep their initial K/V (an attention sink). States of
            recurrent layers have no tokens, and train as a whole.
        layers_to_train (`list[int]`, *optional*):
            The indices of the layers whose K/V and states train; all by default. The others keep their initial ones.
        encoder_prefix (`bool`):
            Whether the encoder's self-attention of an encoder-decoder model also has a prefix. The decoder's self-attention
            always has one.
        cross_prefix (`bool`):
            Whether the cross-attention of an encoder-decoder model also has a prefix, before the encoder's output.
        state_prefix (`bool`):
            Whether the recurrent layers of a hybrid model, or of a model that has no others, also have a prefix: the states
            that they start from. Otherwise they start as in the base model, and only attention layers have a prefix.
        min_learning_rate (`float`, *optional*):
            Lower learning rates of Adam and its kin are raised to it for the prefix, with their schedule, since a prefix learns
            next to nothing at rates for weights. 1e-3 with an MLP and 2e-2 without by default; 0 raises none.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model to train and save besides the prefix, such as the head of a classifier. They must not
            contain an attention layer with a prefix. An adapter with such modules cannot be served.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are also trained and saved, such as those that TRL's `chat_template_path` adds: of the
            input embeddings, or by module. An adapter with such tokens cannot be served.
        save_reparam (`bool`):
            Whether `save_pretrained` keeps the MLP beside the K/V, so that training can continue from the checkpoint.
            Serving does not need it.
        context (`dict`, *optional*):
            Set by `prefix-ext compile`: the context that the prefix stands for, with the SHA-256 of each of its `sources`. That
            of a chat also has the `chat_template` of the messages behind it, and `chat_template_sha256`, the SHA-256 of the
            tokenizer's own.
        init_report (`str`, *optional*):
            Set by the tuner: what the prefix was initialized from.
        prefix_layers (`list[dict]`, *optional*):
            Set when saving: the index, attention module and K/V shapes of each layer.
        prefix_states (`list[dict]`, *optional*):
            Set when saving: the index, module, kind and shape of each state of a recurrent layer.
        base_fingerprint (`dict`, *optional*):
            Set when saving: the architecture of the base model.
        base_adapters (`list[dict]`, *optional*):
            Set when saving: the other active adapters of the base model, such as LoRA.
        format_version (`int`):
            Set when saving: the version of the checkpoint format.
    """

    num_virtual_tokens: int = field(default=64, metadata={"help": "The length of the prefix."})
    init: str = field(
        default=AUTO,
        metadata={
            "help": f"What to initialize the prefix from, one of {tuple(INITS)}; by default by the argument given."
        },
    )
    init_token_ids: list[int] | None = field(default=None, metadata={"help": "Token ids, for `init='tokens'`."})
    init_text: str | None = field(default=None, metadata={"help": "The task description, for `init='text'`."})
    init_chat_template: bool = field(
        default=False, metadata={"help": "Whether to render `init_text` as a system message."}
    )
    init_exemplars: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "Dataset rows, for `init='exemplars'`."}
    )
    init_kv: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "The K/V of one sequence, for `init='kv'`."}
    )
    init_kv_next_position: int | None = field(
        default=None,
        metadata={"help": "The position of the text after `init_kv`, if it is not the number of virtual tokens."},
    )
    init_adapter: str | list[str] | None = field(
        default=None, metadata={"help": "Another prefix, or several for `init='average'`: folders or Hub repositories."}
    )
    init_adapter_part: str = field(
        default="all", metadata={"help": f"What to take of `init_adapter`, one of {ADAPTER_PARTS}."}
    )
    init_std: float = field(default=0.02, metadata={"help": "The standard deviation of random K/V and states."})
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The tokenizer for text, rows and vocabulary; that of the base model by default."},
    )
    reparam: str = field(default="mlp", metadata={"help": f"How the K/V are parameterized, one of {REPARAMS}."})
    reparam_latent_size: int = field(default=64, metadata={"help": "The size of the MLP's trainable input."})
    reparam_hidden_size: int = field(default=256, metadata={"help": "The hidden size of the MLP."})
    reparam_num_layers: int = field(default=1, metadata={"help": "The number of hidden layers of the MLP."})
    reparam_activation: str = field(default="tanh", metadata={"help": "The activation function of the MLP."})
    reparam_dropout: float = field(
        default=0.0, metadata={"help": "The dropout probability after each hidden layer of the MLP."}
    )
    reparam_residual: bool = field(
        default=True, metadata={"help": "Whether the output of the MLP is added to the initial K/V."}
    )
    reparam_shared_trunk: bool = field(
        default=True, metadata={"help": "Whether all layers share the hidden layers of the MLP."}
    )
    reparam_joint_kv: bool = field(
        default=True, metadata={"help": "Whether keys and values share the hidden layers of the MLP."}
    )
    prefix_dropout: float = field(default=0.0, metadata={"help": "The dropout probability of the elements of the K/V."})
    token_dropout: float = field(default=0.0, metadata={"help": "The probability that a virtual token is masked."})
    num_frozen_tokens: int = field(
        default=0, metadata={"help": "The number of virtual tokens, from the first, that keep their initial K/V."}
    )
    layers_to_train: list[int] | None = field(
        default=None, metadata={"help": "The indices of the layers whose K/V train; all by default."}
    )
    encoder_prefix: bool = field(
        default=False, metadata={"help": "Whether the encoder of an encoder-decoder model also has a prefix."}
    )
    cross_prefix: bool = field(
        default=False, metadata={"help": "Whether the cross-attention of an encoder-decoder model also has a prefix."}
    )
    state_prefix: bool = field(
        default=True, metadata={"help": "Whether recurrent layers also have a prefix: the states that they start from."}
    )
    min_learning_rate: float | None = field(
        default=None, metadata={"help": "Lower learning rates are raised to it; 1e-3 with an MLP and 2e-2 without."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules of the base model to train and save besides the prefix, such as a classifier."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Tokens whose embeddings are also trained: of the input embeddings, or by module."},
    )
    save_reparam: bool = field(
        default=True, metadata={"help": "Whether to save the MLP, so that training can continue."}
    )
    context: dict[str, Any] | None = field(
        default=None, metadata={"help": "Set by `prefix-ext compile`: the context that the prefix stands for."}
    )
    init_report: str | None = field(
        default=None, metadata={"help": "Set by the tuner: what the prefix was initialized from."}
    )
    prefix_layers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Set when saving: index, module and K/V shapes of each layer."}
    )
    prefix_states: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Set when saving: index, module, kind and shape of each state."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Set when saving: the architecture of the base model."}
    )
    base_adapters: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Set when saving: the other active adapters of the base model."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "The version of the checkpoint format."})

    # PEFT reads it from every config; the attention layers are found by a probe instead.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_EXT
        if self.is_saved and not self.prefix_states:
            self.state_prefix = False
        if isinstance(self.init_adapter, PathLike):
            self.init_adapter = str(self.init_adapter)
        elif isinstance(self.init_adapter, (list, tuple)):
            self.init_adapter = [str(source) for source in self.init_adapter]
        # Facts about the base model, set by the tuner. They are part of the saved dict but not of the live config, so that
        # one config object can be used for several models.
        self._saved_fields: dict[str, Any] = {}
        _check_at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        if self.init == AUTO:
            self.init = _init_of_source(self)
        _check_one_of("init", self.init, INITS)
        check_sources(self)
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
        for name in ("reparam_dropout", "prefix_dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.min_learning_rate is not None and not 0 <= self.min_learning_rate < inf:
            raise ValueError(f"`min_learning_rate` must be a number >= 0, got {self.min_learning_rate}.")
        if self.layers_to_train is not None:
            _check_integers("layers_to_train", self.layers_to_train)
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            _check_integers("trainable_token_indices", indices)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The kinds of attention that have a prefix."""
        wanted = {DECODER: True, CROSS: self.cross_prefix, ENCODER: self.encoder_prefix}
        return tuple(attention for attention in ATTENTIONS if wanted[attention])

    @property
    def is_saved(self) -> bool:
        """Whether this config belongs to a saved adapter, whose weights are loaded later."""
        return self.prefix_layers is not None

    def trains(self, layer_index: int) -> bool:
        """Whether `layers_to_train` includes a layer."""
        return self.layers_to_train is None or layer_index in self.layers_to_train

    def forget_sources(self) -> None:
        """Releases the data that the prefix is initialized from."""
        for name in UNSAVED_FIELDS:
            setattr(self, name, None)

    def to_dict(self) -> dict[str, Any]:
        shared = copy.copy(self)
        shared.forget_sources()
        fields = {**PeftConfig.to_dict(shared), **self._saved_fields}
        if fields["prefix_layers"] is not None and not fields["prefix_states"]:
            del fields["state_prefix"]  # as no states were saved
        return {name: value for name, value in fields.items() if LATER_FIELDS.get(name, ...) != value}


def _init_of_source(config: PrefixExtConfig) -> str:
    """Returns the `init` of the argument that is given. If several are given, `check_sources` refuses all but one."""
    if isinstance(config.init_adapter, list):
        return "average"
    given = [init for init, source in INITS.items() if source is not None and getattr(config, source) is not None]
    return given[0] if given else "random"


def check_sources(config: PrefixExtConfig) -> None:
    """Raises `ValueError` if the argument of `init` is missing, or one of another `init` is given."""
    needed = INITS[config.init]
    for name in dict.fromkeys(filter(None, INITS.values())):
        given = getattr(config, name) is not None
        if name == needed and not given and not config.is_saved:
            raise ValueError(f"`{name}` must be given when `init={config.init!r}`.")
        if name != needed and given:
            uses = " or ".join(f"`init={init!r}`" for init, source in INITS.items() if source == name)
            raise ValueError(f"`{name}` is only used with {uses}, got `init={config.init!r}`.")
    if config.init_chat_template and config.init != "text":
        raise ValueError(f"`init_chat_template` is only used with `init='text'`, got `init={config.init!r}`.")
    _check_one_of("init_adapter_part", config.init_adapter_part, ADAPTER_PARTS)
    if config.init_adapter_part != "all" and needed != "init_adapter":
        raise ValueError(
            f"`init_adapter_part` is only used with `init='adapter'` or `init='average'`, got `init={config.init!r}`."
        )
    if config.init_kv_next_position is not None:
        if config.init != "kv":
            raise ValueError(f"`init_kv_next_position` is only used with `init='kv'`, got `init={config.init!r}`.")
        _check_at_least("init_kv_next_position", config.init_kv_next_position, 0)
    if config.init_token_ids is not None:
        _check_integers("init_token_ids", config.init_token_ids)
    if config.init_exemplars is not None and not are_rows(config.init_exemplars):
        raise ValueError(
            "`init_exemplars` must be rows, as a list, one split of a data set or a data frame, got "
            f"{type(config.init_exemplars).__name__}."
        )
    if config.init == "adapter" and not isinstance(config.init_adapter, (str, type(None))):
        raise ValueError(f"`init_adapter` must be a path or a repository, got {config.init_adapter!r}.")
    if config.init == "average" and (isinstance(config.init_adapter, str) or config.init_adapter == []):
        raise ValueError(
            f"`init_adapter` must be a list of paths or repositories for `init='average'`, got {config.init_adapter!r}."
        )


def _check_at_least(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}.")


def _check_integers(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise ValueError(f"`{name}` must be a list of integers, got {value!r}.")


def _check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {value!r}.")
