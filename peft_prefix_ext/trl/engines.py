"""What TRL's code calls an engine and a client: those of vLLM and of TRL, whose requests all have the current prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import wrapt
from trl.generation.vllm_client import VLLMClient

from peft_prefix_ext.generation.vllm_engine import load_prefix, request_of
from peft_prefix_ext.trl.policy_folder import POLICY


class PrefixLLM(wrapt.ObjectProxy):
    """An engine whose requests have the prefix, and which keeps its weights when it sleeps."""

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__.generate(*args, lora_request=request_of(POLICY), **options)

    def load_prefix(self, folder: str) -> None:
        """Loads the prefix in a folder in place of the one before."""
        load_prefix(self.__wrapped__, POLICY, folder)

    def sleep(self, level: int = 1) -> Any:
        # Level 2 would discard the weights, which TRL pushes again from the model that it trains. They never change here.
        return self.__wrapped__.sleep(level=min(level, 1))


class PrefixClient(VLLMClient):
    """A client of a server whose requests have the prefix, and which needs no group for weights."""

    def init_communicator(self, *args: Any, **options: Any) -> None:
        """Does nothing: no weights are sent."""

    def load_prefix(self, folder: str) -> None:
        """Loads the prefix in a folder into the server, in place of the one before.

        Raises:
            RuntimeError: If the server refuses it.
        """
        body: Any = {"lora_name": POLICY, "lora_path": folder, "load_inplace": True}
        response = self.session.post(f"{self.base_url}/v1/load_prefix_adapter", json=body)
        if response.status_code != 200:
            raise RuntimeError(
                f"The server at {self.base_url} does not load the prefix in {folder} ({response.status_code}: "
                f"{response.text.strip()}): start it with `--enable-prefix-adapters` and "
                "`PREFIX_SERVE_ALLOW_RUNTIME_UPDATING=1`, where it sees this folder."
            )
        self.model = POLICY


@contextmanager
def classes_in_place(module: ModuleType, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Lets code of a module make other objects than those of its own classes, which it looks up in the module.

    TRL has no hook for its engine, its client and its `VLLMGeneration`.

    Raises:
        ImportError: If this release of TRL has no such classes there.
    """
    for name in replacements:
        if not hasattr(module, name):
            raise ImportError(
                f"TRL {version('trl')} has no `{module.__name__}.{name}`, which prefixes take the place of: use TRL 1.16."
            )
    originals = {name: getattr(module, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
