"""Makes PEFT know the type `PREFIX_EXT`.

`register_peft_method` only accepts names that are members of the enum `PeftType`, and PEFT has no hook to add one
(huggingface/peft#2273), so the member is added here, once, in the way that `aenum.extend_enum` does.
"""

from __future__ import annotations

import peft
from peft.utils.peft_types import PeftType

NAME = "PREFIX_EXT"


def register() -> None:
    """Registers the config and the tuner with PEFT; calling it again does nothing."""
    if NAME not in PeftType.__members__:
        _add_member()
    if getattr(PeftType, NAME) in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    from peft_prefix_ext.config import PrefixExtConfig
    from peft_prefix_ext.model import PrefixExtModel

    peft.utils.register_peft_method(name=NAME.lower(), config_cls=PrefixExtConfig, model_cls=PrefixExtModel)


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # Python 3.11 finds members through the metaclass' __getattr__, later ones as attributes of the class.
    type.__setattr__(PeftType, NAME, member)
