"""`model=NAME`: the adapters among the models of a server, and how an operator loads and unloads them at run time."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission

from vllm_plugin.adapters import base_lora
from vllm_plugin.adapters.adapter_kinds import holds_prefix
from vllm_plugin.adapters.loading import open_adapter
from vllm_plugin.adapters.options import AdapterOption, check_name
from vllm_plugin.adapters.registry import Adapter, NameTakenError, registry_in
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.runtime_loading import names_in, publish
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.validation import check_served_names
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError
from vllm_plugin.front_end.warmup import warm_up
from vllm_plugin.kv_transfer_config import WARMUP, settings_in
from vllm_plugin.logger import logger

# Each load holds the tensors of an adapter while it is checked.
_MAX_CONCURRENT_LOADS = 4


class PrefixModels:
    """The adapters of a server, beside vLLM's `OpenAIServingModels`.

    Every API server process has an instance, and all of them see the same adapters.

    Args:
        models: vLLM's `OpenAIServingModels` of a server with prefixes.
    """

    def __init__(self, models: Any) -> None:
        self._models = models
        self._engine = models.engine_client
        self._config = self._engine.vllm_config
        registry = registry_in(self._config.kv_transfer_config)
        assert registry is not None
        self._registry = registry
        settings = settings_in(self._config.kv_transfer_config)
        self._warms_up = bool(settings and settings.get(WARMUP))
        self._load_limit = asyncio.Semaphore(_MAX_CONCURRENT_LOADS)

    async def start(self) -> None:
        """Prepares the adapters for their first request. The engine must be running.

        Raises:
            PrefixServeError: If an adapter has the name of another model, or the engine cannot load it.
        """
        adapters = self._registry.adapters()
        check_served_names((adapter.spec.name for adapter in adapters), self._other_names())
        await base_lora.load(self._engine, [adapter.spec for adapter in adapters])
        # Every API server process warms up before it is ready: all but the first find the prefixes in the cache.
        if self._warms_up:
            await warm_up(self._engine, [adapter.spec for adapter in adapters])

    def spec(self, name: str | None) -> PrefixSpec | None:
        """Returns the adapter called `name`; None if there is none."""
        adapter = self._registry.get(name) if name else None
        return None if adapter is None else adapter.spec

    def chat_template(self, name: str | None) -> str | None:
        """Returns the chat template of the messages behind the adapter called `name`; None for the model's own."""
        adapter = self._registry.get(name) if name else None
        return None if adapter is None else adapter.chat_template

    def request(self, name: str | None) -> PrefixAdapterRequest | None:
        """Returns the `lora_request` for the adapter called `name`; None if there is none."""
        spec = self.spec(name)
        return None if spec is None else PrefixAdapterRequest(lora_name=spec.name, spec=spec)

    def with_names(self, response: ErrorResponse) -> ErrorResponse:
        """Adds the adapters to an error that lists the available models."""
        if response.error.code == HTTPStatus.NOT_FOUND:
            response.error.message += f" Prefix adapters: {names_in(self._registry)}."
        return response

    def announce(self, address: Any, *, secure: bool) -> None:
        """Logs what is served, and where.

        Args:
            address: The socket's address: host and port, or the path of a Unix socket.
            secure: Whether the server uses TLS.
        """
        if isinstance(address, tuple):
            host, port = address[:2]
            address = f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        models = ", ".join(base.name for base in self._models.base_model_paths)
        logger.info("Serving on %s: %s; prefix adapters: %s", address, models, names_in(self._registry))

    def cards(self) -> list[ModelCard]:
        """Returns the entries of `/v1/models`, in the form of those of LoRA modules."""
        return [
            ModelCard(
                id=adapter.spec.name,
                root=adapter.spec.source,
                parent=self._parent(adapter),
                permission=[ModelPermission()],
            )
            for adapter in self._registry.adapters()
        ]

    async def load(self, name: str, path: str, *, draft_path: str | None = None, replace: bool) -> ErrorResponse | str:
        """Reads, checks and adds an adapter. If anything fails, nothing changes.

        Args:
            name: The name that requests use.
            path: Folder or Hub repository, as on the command line.
            draft_path: The prefix for the draft model, if any.
            replace: Whether to replace an adapter that has this name.
        """
        if not name or not path:
            return refusal("Both 'prefix_name' and 'prefix_path' must be provided.")
        if name in self._other_names():
            return refusal(f"The prefix adapter '{name}' conflicts with a served model.", HTTPStatus.CONFLICT)
        taken = refusal(
            f"The prefix adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
            HTTPStatus.CONFLICT,
        )
        if not replace and self.spec(name) is not None:
            return taken
        try:
            check_name(name)
            # In a thread: it reads and hashes a file, or downloads it, and must not block running requests.
            async with self._load_limit:
                option = AdapterOption(name, path, draft_path=draft_path or None)
                adapter = await asyncio.to_thread(open_adapter, option, self._config, self._registry)
            await base_lora.load(self._engine, [adapter.spec])
            if self._warms_up:
                await warm_up(self._engine, [adapter.spec])
        except PrefixServeError as error:
            missing = isinstance(error, AdapterNotFoundError)
            return refusal(str(error), HTTPStatus.NOT_FOUND if missing else HTTPStatus.BAD_REQUEST)
        try:
            publish(adapter, self._registry, self._config, replace=replace)
        except NameTakenError:
            return taken
        return f"Success: Prefix adapter '{name}' added successfully."

    def unload(self, name: str) -> ErrorResponse | str:
        """Removes an adapter. New requests for it get 404; running requests finish."""
        if not name:
            return refusal("'prefix_name' needs to be provided to unload a prefix adapter.")
        try:
            self._registry.remove(name)
        except KeyError:
            return refusal(f"The prefix adapter '{name}' cannot be found.", HTTPStatus.NOT_FOUND)
        logger.info("Removed prefix adapter: name '%s'", name)
        return f"Success: Prefix adapter '{name}' removed successfully."

    def _other_names(self) -> set[str]:
        return {*(base.name for base in self._models.base_model_paths), *self._models.lora_requests}

    def _parent(self, adapter: Adapter) -> str:
        named = adapter.base_model_name
        return named if named and self._models.is_base_model(named) else self._models.base_model_paths[0].name


def refuse_lora(request: Any, prefixes: PrefixModels | None) -> ErrorResponse | None:
    """Returns the error for loading a LoRA adapter that has the name of a prefix or is a prefix; None for any other.

    Args:
        request: vLLM's `LoadLoRAAdapterRequest`.
        prefixes: The adapters of this server, if it has any.
    """
    if prefixes is not None and prefixes.spec(request.lora_name) is not None:
        return refusal(f"The lora adapter '{request.lora_name}' conflicts with a prefix adapter.")
    if not holds_prefix(request.lora_path):
        return None
    start = "" if prefixes is not None else " to a server that was started with --enable-prefix-adapters"
    return refusal(
        f"The lora adapter '{request.lora_name}' is a prefix, not a LoRA; load it by POST /v1/load_prefix_adapter{start}."
    )


_ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "InvalidUserInput",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
}


def refusal(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ErrorResponse:
    """Returns an error in the form of vLLM's endpoints."""
    return create_error_response(message=message, err_type=_ERROR_TYPES[status], status_code=status)
