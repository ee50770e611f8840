"""`PrefixExtConfig`: every choice of a prefix, in PEFT's config format."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from peft import PeftConfig
from transformers.activations import ACT2FN

from peft_prefix_ext.checkpoint.format import ATTENTIONS, CROSS, DECODER, ENCODER, FORMAT_VERSION
from peft_prefix_ext.dataset_rows import are_records
from peft_prefix_ext.peft_type import PREFIX_EXT

# Every initialisation, with the argument that says what it starts from.
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
# What does not go where an adapter is shared.
UNSAVED_FIELDS = ("init_exemplars", "init_kv")
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
            Where the prefix starts. As the K/V that a prefill of the frozen base model writes for token ids: `"vocab"`
            (drawn at random), `"tokens"` (`init_token_ids`), `"text"` (the words of `init_text`) or `"exemplars"` (the
            rows of `init_exemplars`). As K/V: `"random"` (normal with `init_std`), `"kv"` (`init_kv`), `"adapter"`
            (another prefix, `init_adapter`) or `"average"` (the mean of several). `"auto"` is what uses the one of these
            arguments that is given, or `"random"`. What is drawn follows `torch.manual_seed`.
        init_token_ids (`list[int]`, *optional*):
            The token ids for `init="tokens"`, taken as they are: repeated when shorter than the prefix, cut when longer.
        init_text (`str`, *optional*):
            The words of the task, for `init="text"`. They come behind the beginning-of-sequence token, if the tokenizer
            adds one, and are repeated when they are shorter than the prefix, cut when longer.
        init_chat_template (`bool`):
            Whether `init_text` is rendered as a system message by the tokenizer's chat template. What is repeated or cut
            are the words inside of the message, so that the prefix is one whole message of its length; only where what
            opens and closes it leaves no room for a word, the end is cut off.
        init_exemplars (`Iterable`, *optional*):
            Rows of the task's data set, for `init="exemplars"`, packed in their order: a list, one split of `datasets` or
            a data frame, of strings or of dicts with `text`, `prompt` and `completion`, or `messages`. They come behind
            the beginning-of-sequence token, if the tokenizer adds one; all but messages end with its end-of-sequence
            token. The last row is cut; too few are repeated. Never saved.
        init_kv (`Cache`, `list` or `dict`, *optional*):
            The K/V for `init="kv"`, keys after rotary embedding at positions 0..p-1: the `past_key_values` of one
            sequence, a list of pairs of K and V, one for each attention layer, or a dict of them by layer index, each
            `[num_kv_heads, num_virtual_tokens, head_dim]`, with a batch dimension of 1 or without. Never saved.
        init_adapter (`str` or `list[str]`, *optional*):
            The folder or Hub repository (`owner/name[@revision]`) of another prefix of the same base model for
            `init="adapter"`, or of several for `init="average"`: ours, or stock PEFT's `PREFIX_TUNING` or `CARTRIDGE`.
            Of a longer prefix the first tokens are taken, a shorter one is refused.
        init_adapter_part (`str`):
            `"all"`, or `"keys"`: keys alone, which transfer between tasks (arXiv:2508.17032), beside values that are
            random with `init_std`.
        init_std (`float`):
            The standard deviation of what is random.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer of text, rows and vocabulary; the base model's when not given.
        reparam (`str`):
            `"mlp"` trains an MLP that yields the K/V, `"none"` the K/V themselves, which wants a learning rate about ten
            times as large. Any initialisation is exact at step 0.
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
        encoder_prefix (`bool`):
            Whether the self-attention of an encoder-decoder model's encoder has a prefix, too. The self-attention of the
            decoder always has one.
        cross_prefix (`bool`):
            Whether the cross-attention of an encoder-decoder model has a prefix, too, before what the encoder says.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model, apart from the prefix, to train and save as a whole, such as the head of a
            classifier; none that holds an attention with a prefix. An adapter with such modules cannot be served.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings train and are saved, too, such as those that TRL's `chat_template_path` adds: of the
            input embeddings, or by module. An adapter with such tokens cannot be served.
        save_reparam (`bool`):
            Whether `save_pretrained` keeps the MLP beside the K/V, so that training can go on from the checkpoint.
            Serving never needs it.
        init_report (`str`, *optional*):
            Recorded by the tuner, not to be set: what the prefix was initialised from.
        prefix_layers (`list[dict]`, *optional*):
            Recorded when saved, not to be set: the index, attention module and K/V shapes of each layer.
        base_fingerprint (`dict`, *optional*):
            Recorded when saved, not to be set: the architecture of the base model.
        base_adapters (`list[dict]`, *optional*):
            Recorded when saved, not to be set: which other adapters were at work in the base model, such as LoRA.
        format_version (`int`):
            Recorded when saved, not to be set: the version of the checkpoint format.
    """

    num_virtual_tokens: int = field(default=64, metadata={"help": "The length of the prefix."})
    init: str = field(
        default=AUTO,
        metadata={"help": f"Where the prefix starts, one of {tuple(INITS)}; by default as the source given says."},
    )
    init_token_ids: list[int] | None = field(default=None, metadata={"help": "Token ids, for `init='tokens'`."})
    init_text: str | None = field(default=None, metadata={"help": "The words of the task, for `init='text'`."})
    init_chat_template: bool = field(
        default=False, metadata={"help": "Whether `init_text` is rendered as a system message."}
    )
    init_exemplars: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "Rows of a data set, for `init='exemplars'`."}
    )
    init_kv: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "The K/V of one sequence, for `init='kv'`."}
    )
    init_adapter: str | list[str] | None = field(
        default=None, metadata={"help": "Another prefix, or several for `init='average'`: folders or Hub repositories."}
    )
    init_adapter_part: str = field(
        default="all", metadata={"help": f"What to take of `init_adapter`, one of {ADAPTER_PARTS}."}
    )
    init_std: float = field(default=0.02, metadata={"help": "The standard deviation of what is random."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer of text and rows; the base model's when not given."}
    )
    reparam: str = field(default="mlp", metadata={"help": f"How the K/V are parameterized, one of {REPARAMS}."})
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
    encoder_prefix: bool = field(
        default=False, metadata={"help": "Whether the encoder of an encoder-decoder model has a prefix, too."}
    )
    cross_prefix: bool = field(
        default=False, metadata={"help": "Whether the cross-attention of an encoder-decoder model has a prefix, too."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train and save as a whole, such as a classifier."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train, too: of the input embeddings, or by module."}
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
    base_adapters: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Recorded when saved: the other adapters at work in the base model."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "The version of the checkpoint format."})

    # PEFT's injection reads it from every config; the attention layers are found by a probe instead.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_EXT
        if isinstance(self.init_adapter, PathLike):
            self.init_adapter = str(self.init_adapter)
        elif isinstance(self.init_adapter, (list, tuple)):
            self.init_adapter = [str(source) for source in self.init_adapter]
        # What the tuner learns about the base model. It becomes part of the dict that is saved, not of the live config,
        # so that one config object can be used for several models.
        self._recorded: dict[str, Any] = {}
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
        for name in ("reparam_dropout", "prefix_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.layers_to_train is not None:
            _check_integers("layers_to_train", self.layers_to_train)
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            _check_integers("trainable_token_indices", indices)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Which kinds of attention have a prefix."""
        wanted = {DECODER: True, CROSS: self.cross_prefix, ENCODER: self.encoder_prefix}
        return tuple(attention for attention in ATTENTIONS if wanted[attention])

    @property
    def is_saved(self) -> bool:
        """Whether this config was read from a saved adapter, whose weights are about to be loaded."""
        return self.prefix_layers is not None

    def trains(self, layer_index: int) -> bool:
        """Whether the K/V of a layer train, by `layers_to_train`."""
        return self.layers_to_train is None or layer_index in self.layers_to_train

    def forget_sources(self) -> None:
        """Lets go of the data that the prefix started from."""
        for name in UNSAVED_FIELDS:
            setattr(self, name, None)

    def to_dict(self) -> dict[str, Any]:
        shared = copy.copy(self)
        shared.forget_sources()
        return {**super(PrefixExtConfig, shared).to_dict(), **self._recorded}


def _init_of_source(config: PrefixExtConfig) -> str:
    """Returns the initialisation that uses what a config gives; of several things `check_sources` refuses all but one."""
    if isinstance(config.init_adapter, list):
        return "average"
    given = [init for init, source in INITS.items() if source is not None and getattr(config, source) is not None]
    return given[0] if given else "random"


def check_sources(config: PrefixExtConfig) -> None:
    """Raises `ValueError` if what the prefix starts from is missing, or of another initialisation."""
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
    if config.init_token_ids is not None:
        _check_integers("init_token_ids", config.init_token_ids)
    if config.init_exemplars is not None and not are_records(config.init_exemplars):
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
