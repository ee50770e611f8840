"""The current prefix as files: where an engine, in this process or another, reads it after each update."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel

from peft_prefix_ext.config import PrefixExtConfig

POLICY = "policy"
# An engine may still read the one before.
_NUM_KEPT = 2


class PolicyFolder:
    """A folder with the last versions of a prefix, which all processes see.

    Args:
        accelerator: The accelerator of the trainer.
        parent: The folder to make it in; the system's temporary folder by default. A server must see it under the same path.
    """

    def __init__(self, accelerator: Accelerator, parent: str | Path | None = None) -> None:
        self.accelerator = accelerator
        # Goes with this object, at the latest when the process ends.
        self._own = TemporaryDirectory(prefix="prefix-policy-", dir=parent) if accelerator.is_main_process else None
        paths = [self._own.name if self._own else None]
        broadcast_object_list(paths)
        self.path = Path(str(paths[0]))
        self.version = 0

    def save(self, model: Any) -> Path:
        """Saves the active prefix of a model, in all processes together, and returns its folder.

        Args:
            model: The `PeftModel`, in whatever wrapper.

        Raises:
            ValueError: If no prefix is active.
        """
        policy, name = policy_of(self.accelerator.unwrap_model(model))
        state = self.accelerator.get_state_dict(model) if _is_sharded(self.accelerator) else None
        self.version += 1
        folder = self.path / str(self.version)
        if self.accelerator.is_main_process:
            # The other adapters as well: a LoRA adapter below is read from beside the prefix.
            policy.save_pretrained(str(folder), state_dict=state)
            shutil.rmtree(self.path / str(self.version - _NUM_KEPT), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return folder if name == "default" else folder / name


def policy_of(model: Any) -> tuple[PeftModel, str]:
    """Returns the model that is trained and the name of its active prefix.

    Raises:
        ValueError: If it is no `PeftModel` with an active prefix.
    """
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            if isinstance(model.peft_config[name], PrefixExtConfig):
                return model, name
    raise ValueError(
        "These trainers generate with a prefix: give a model with one, or `peft_config=PrefixExtConfig(...)`. For others, "
        "use those of TRL."
    )


def _is_sharded(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)
