"""TRL's trainers that generate while they train, with a prefix in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import trl.experimental.online_dpo.online_dpo_trainer as online_dpo_trainer
import trl.trainer.grpo_trainer as grpo_trainer
import trl.trainer.rloo_trainer as rloo_trainer

from peft_prefix_ext.trl.engines import classes_in_place
from peft_prefix_ext.trl.policy_folder import PolicyFolder
from peft_prefix_ext.trl.rollouts import PrefixRollouts, engine_classes, send_prefix


class _WithPrefixRollouts:
    """What GRPO and RLOO share: TRL makes their `VLLMGeneration` in the constructor, and ours takes its place there."""

    trl_module: ModuleType

    def __init__(
        self,
        *args: Any,
        vllm_engine: Mapping[str, Any] | None = None,
        vllm_prefix_folder: str | None = None,
        **options: Any,
    ) -> None:
        rollouts = partial(PrefixRollouts, engine=vllm_engine, folder=vllm_prefix_folder)
        with classes_in_place(self.trl_module, VLLMGeneration=rollouts):
            super().__init__(*args, **options)


class GRPOTrainer(_WithPrefixRollouts, grpo_trainer.GRPOTrainer):
    """TRL's `GRPOTrainer`, whose `use_vllm=True` generates with the prefix that it trains.

    Args:
        *args: The arguments of TRL's trainer.
        vllm_engine: More keyword arguments of vLLM's `LLM`, in colocate mode. The dtype is that of the model by default.
        vllm_prefix_folder: A folder to keep the current prefix in; the system's temporary folder by default. In server
            mode, the server must see it under the same path.
        **options: The keyword arguments of TRL's trainer.
    """

    trl_module = grpo_trainer


class RLOOTrainer(_WithPrefixRollouts, rloo_trainer.RLOOTrainer):
    """TRL's `RLOOTrainer`, whose `use_vllm=True` generates with the prefix that it trains; its arguments are `GRPOTrainer`'s."""

    trl_module = rloo_trainer


class OnlineDPOTrainer(online_dpo_trainer.OnlineDPOTrainer):
    """TRL's `OnlineDPOTrainer`, whose `use_vllm=True` generates with the prefix that it trains.

    Args:
        *args: The arguments of TRL's trainer.
        vllm_engine: See `GRPOTrainer`.
        vllm_prefix_folder: See `GRPOTrainer`.
        **options: The keyword arguments of TRL's trainer.
    """

    def __init__(
        self,
        *args: Any,
        vllm_engine: Mapping[str, Any] | None = None,
        vllm_prefix_folder: str | None = None,
        **options: Any,
    ) -> None:
        self._vllm_engine, self._vllm_prefix_folder = dict(vllm_engine or {}), vllm_prefix_folder
        classes = {}
        if hasattr(online_dpo_trainer, "LLM"):  # vLLM is installed
            classes = engine_classes(online_dpo_trainer, lambda: self.model, lambda: self._policy, self._vllm_engine)
        with classes_in_place(online_dpo_trainer, **classes):
            super().__init__(*args, **options)

    @property
    def _policy(self) -> PolicyFolder:
        if not hasattr(self, "_policy_folder"):
            self._policy_folder = PolicyFolder(self.accelerator, self._vllm_prefix_folder)
        return self._policy_folder

    def _move_model_to_vllm(self) -> None:
        target: Any = self.llm if self.vllm_mode == "colocate" else self.vllm_client
        send_prefix(self._policy, self.model, target)
