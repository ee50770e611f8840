"""Adds the member `PREFIX_EXT` to PEFT's enum `PeftType`.

`register_peft_method` only accepts members of it, and PEFT has no hook to add one (huggingface/peft#2273). This does the
same as `aenum.extend_enum`.
"""

from __future__ import annotations

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
