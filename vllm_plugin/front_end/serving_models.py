"""`model=NAME`: the adapters among the models of a server, and what an operator changes about them at run time."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission

from vllm_plugin.adapters import base_lora
from vllm_plugin.adapters.adapter_kinds import holds_prefix
from vllm_plugin.adapters.loading import check_served_names, logger, open_adapter
from vllm_plugin.adapters.registry import Adapter, NameTakenError, registry_in
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.runtime_loading import names_in, publish
from vllm_plugin.adapters.spec import WARMUP, PrefixSpec, settings_in
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError
from vllm_plugin.front_end.cli_args import AdapterOption, check_name
from vllm_plugin.front_end.warmup import warm_up

# Each holds the tensors of an adapter while they are checked.
_LOADS_AT_ONCE = 4


class PrefixModels:
    """The adapters of a server, beside vLLM's `OpenAIServingModels`.

    Every API server process has one, and all of them see the same adapters.

    Args:
        models: vLLM's part, of a server with prefixes.
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
        self._turn = asyncio.Semaphore(_LOADS_AT_ONCE)

    async def start(self) -> None:
        """Makes ready for the first request, with the engine running.

        Raises:
            PrefixServeError: If an adapter has the name of another model, or the engine cannot load it.
        """
        adapters = self._registry.adapters()
        check_served_names((adapter.spec.name for adapter in adapters), self._other_names())
        await base_lora.load(self._engine, [adapter.spec for adapter in adapters])
        # Of several processes each does so, since each is ready by itself: all but the first find the cache full.
        if self._warms_up:
            await warm_up(self._engine, [adapter.spec for adapter in adapters])

    def spec(self, name: str | None) -> PrefixSpec | None:
        """Returns the adapter `name`; None if this names something else."""
        adapter = self._registry.get(name) if name else None
        return None if adapter is None else adapter.spec

    def request(self, name: str | None) -> PrefixAdapterRequest | None:
        """Returns what stands for the adapter `name` in a request; None if it names something else."""
        spec = self.spec(name)
        return None if spec is None else PrefixAdapterRequest(lora_name=spec.name, spec=spec)

    def with_names(self, answer: ErrorResponse) -> ErrorResponse:
        """Adds the adapters to an answer that says which models there are."""
        if answer.error.code == HTTPStatus.NOT_FOUND:
            answer.error.message += f" Prefix adapters: {names_in(self._registry)}."
        return answer

    def announce(self, address: Any, *, secure: bool) -> None:
        """Tells the log what is served, and where.

        Args:
            address: Of the socket: host and port, or the path of a Unix socket.
            secure: Whether it speaks TLS.
        """
        if isinstance(address, tuple):
            host, port = address[:2]
            address = f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        models = ", ".join(base.name for base in self._models.base_model_paths)
        logger.info("Serving on %s: %s; prefix adapters: %s", address, models, names_in(self._registry))

    def cards(self) -> list[ModelCard]:
        """Lists the adapters as `/v1/models` does LoRA modules."""
        return [
            ModelCard(
                id=adapter.spec.name,
                root=adapter.spec.source,
                parent=self._parent(adapter),
                permission=[ModelPermission()],
            )
            for adapter in self._registry.adapters()
        ]

    async def load(self, name: str, path: str, *, replace: bool) -> ErrorResponse | str:
        """Reads, checks and adds an adapter, or changes nothing.

        Args:
            path: Folder or Hub repository, as on the command line.
            replace: Whether it may take the place of the adapter that has this name.
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
            # Reads and hashes a file, or downloads it: not in the way of the requests that run.
            async with self._turn:
                adapter = await asyncio.to_thread(
                    open_adapter, AdapterOption(name, path), self._config, self._registry.layers()
                )
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
        """Removes an adapter: new requests for it get 404, those that run go on."""
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
    """Returns what the loading of a LoRA is answered with that has the name of a prefix or is one; None for any other.

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


_KINDS = {
    HTTPStatus.BAD_REQUEST: "InvalidUserInput",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
}


def refusal(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ErrorResponse:
    return create_error_response(message=message, err_type=_KINDS[status], status_code=status)
