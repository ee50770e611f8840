"""Rollouts by vLLM with the prefix as it is now, in the place of those of TRL, which merges adapters into weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import trl.generation.vllm_generation as vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from peft_prefix_ext.generation.vllm_engine import engine_arguments
from peft_prefix_ext.trl.engines import PrefixClient, PrefixLLM, classes_in_place
from peft_prefix_ext.trl.policy_folder import POLICY, PolicyFolder


class PrefixRollouts(VLLMGeneration):
    """TRL's generation with vLLM, where `sync_weights` replaces the prefix of the engine or of the server.

    Args:
        engine: More keyword arguments of vLLM's `LLM` in colocate mode.
        folder: Where the prefix is saved for the engine; a server must see it under the same path.
        **options: The arguments of `VLLMGeneration`.
    """

    def __init__(
        self, *args: Any, engine: Mapping[str, Any] | None = None, folder: str | None = None, **options: Any
    ) -> None:
        self.engine, self.folder = dict(engine or {}), folder
        super().__init__(*args, **options)

    def _init_vllm(self) -> None:
        self.policy = PolicyFolder(self.accelerator, self.folder)
        classes = engine_classes(vllm_generation, lambda: self.model, lambda: self.policy, self.engine)
        with classes_in_place(vllm_generation, **classes):
            super()._init_vllm()
        # The weights stay in place while the engine sleeps.
        self._llm_weights_sleeping = False

    def sync_weights(self) -> None:
        """Puts the current prefix into the engine, in place of the one before. No weights move."""
        if self.mode == "colocate":
            if self.enable_sleep_mode:
                self.llm.wake_up(tags=["weights"])
            send_prefix(self.policy, self.model, self.llm)
        else:
            send_prefix(self.policy, self.model, getattr(self, "vllm_client", None))


def engine_classes(
    module: ModuleType, model: Callable[[], Any], policy: Callable[[], PolicyFolder], engine: Mapping[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Returns what is to take the place of a module's `LLM` and `VLLMClient`.

    Args:
        module: The module of TRL.
        model: Returns the model that is trained, once there is an engine.
        policy: Returns where its prefix is saved.
        engine: More keyword arguments of `LLM`.
    """
    original = module.LLM

    def make_engine(**given: Any) -> PrefixLLM:
        trained = model()
        dtype = str(next(trained.parameters()).dtype).removeprefix("torch.")
        ours = {"dtype": dtype, **engine_arguments({POLICY: str(policy().save(trained))}), **engine}
        return PrefixLLM(original(**{**given, **ours}))

    return {"LLM": make_engine, "VLLMClient": PrefixClient}


def send_prefix(policy: PolicyFolder, model: Any, target: PrefixLLM | PrefixClient | None) -> None:
    """Saves the prefix of a model, in all processes together, and loads it where this process has an engine or a client."""
    current = policy.save(model)
    if target is not None:
        target.load_prefix(str(current))
    policy.accelerator.wait_for_everyone()
