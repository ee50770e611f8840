"""What a prefix can start from, and whether a config gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_prefix_ext.arguments import check_integers, check_one_of
from peft_prefix_ext.dataset_rows import are_records

if TYPE_CHECKING:
    from peft_prefix_ext.config import PrefixExtConfig

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


def init_of_source(config: PrefixExtConfig) -> str:
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
    check_one_of("init_adapter_part", config.init_adapter_part, ADAPTER_PARTS)
    if config.init_adapter_part != "all" and needed != "init_adapter":
        raise ValueError(
            f"`init_adapter_part` is only used with `init='adapter'` or `init='average'`, got `init={config.init!r}`."
        )
    if config.init_token_ids is not None:
        check_integers("init_token_ids", config.init_token_ids)
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
