"""The tuner that PEFT-Factory asks for. It takes the first tuner class that this module has."""

from __future__ import annotations

from peft_prefix_ext.tuner import model


class PrefixExtFactoryModel(model.PrefixExtModel):
    """`PrefixExtModel` under the name of the folder, by which PEFT-Factory registers it.

    PEFT never makes one: it chooses the tuner by the type of the config, which is `PREFIX_EXT`.
    """

    prefix: str = "prefixext_"
