"""Registers the method with PEFT, for which it adds the member `PREFIX_EXT` to PEFT's enum `PeftType`.

`register_peft_method` only accepts members of it, and PEFT has no hook to add one (huggingface/peft#2273). This does the
same as `aenum.extend_enum`.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "PREFIX_EXT"


def _add_member() -> PeftType:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # Python 3.11 finds members through the `__getattr__` of the metaclass, later versions as attributes of the class.
    type.__setattr__(PeftType, NAME, member)
    return member


# It is there already if this module is reloaded.
PREFIX_EXT = PeftType(NAME) if NAME in PeftType._member_map_ else _add_member()


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Registers the classes of the method, again where they are reloaded, as notebooks do by `%autoreload`."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PREFIX_EXT)
    if known is not None and known.__module__ == model.__module__:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
            del mapping[PREFIX_EXT]
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)
