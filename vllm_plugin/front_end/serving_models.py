"""`model=NAME`: the adapters among the models of a server, and how an operator loads and unloads them at run time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMNotFoundError

from vllm_plugin.adapters import base_lora
from vllm_plugin.adapters.loading import open_adapter
from vllm_plugin.adapters.options import AdapterOption, check_name
from vllm_plugin.adapters.registry import Adapter, NameTakenError, registry_in
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.resolver import MAX_CONCURRENT_LOADS, Resolver
from vllm_plugin.adapters.runtime_loading import names_in, publish
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.validation import check_served_names
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError
from vllm_plugin.front_end.model_list import ModelCards
from vllm_plugin.front_end.warmup import warm_up
from vllm_plugin.kv_transfer_config import WARMUP, settings_in
from vllm_plugin.logger import logger
from vllm_plugin.request_errors import PrefixRequestError


class PrefixModels:
    """The adapters of a server, beside vLLM's `OpenAIServingModels`.

    Every API server process has an instance, and all of them see the same adapters.

    Args:
        models: vLLM's `OpenAIServingModels` of a server with prefixes.
    """

    def __init__(self, models: Any) -> None:
        self._models = models
        self.base_names = frozenset(base.name for base in models.base_model_paths)
        self._engine = models.engine_client
        self._config = self._engine.vllm_config
        registry = registry_in(self._config.kv_transfer_config)
        assert registry is not None
        self._registry = registry
        settings = settings_in(self._config.kv_transfer_config) or {}
        # Which adapters are in the cache before the server is ready: True for all, or the names of a few.
        self._warm: bool | Sequence[str] = settings.get(WARMUP) or False
        self._started = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resolver = Resolver(registry, self._config, prepare=self._prepare_in_thread)
        self._cards = ModelCards(models, registry, self._resolver)
        # Of its own: a listing of remote storage that does not end holds up nothing else.
        self._listing = ThreadPoolExecutor(1, thread_name_prefix="prefix-adapters-list")
        self._load_limit = asyncio.Semaphore(MAX_CONCURRENT_LOADS)

    async def start(self) -> None:
        """Prepares the adapters for their first request. The engine must be running.

        Raises:
            PrefixServeError: If an adapter has the name of another model, or the engine cannot load it.
        """
        adapters = self._registry.adapters()
        check_served_names((adapter.spec.name for adapter in adapters), self._other_names())
        await base_lora.load(self._engine, [adapter.spec for adapter in adapters])
        # Every API server process warms up before it is ready: all but the first find the prefixes in the cache.
        if self._warm:
            await self._warm_up_at_start(
                [adapter.spec.name for adapter in adapters] if self._warm is True else self._warm
            )
        self._started = True

    async def resolve(self, name: str | None) -> Adapter | ErrorResponse | None:
        """Finds the adapter of a request before anything else looks for it, and reads it if it is its first request.

        Returns:
            The adapter; an error if it cannot be served; None if this is no name of a prefix.
        """
        if not name or (adapter := self._resolver.ready(name)) is not None:
            return adapter if name else None
        if not self._resolver.has_sources and self._registry.get(name) is None:
            return None
        if name in self.base_names or name in self._models.lora_requests:
            return None
        try:
            return await self._resolved(name)
        except PrefixServeError as error:
            return refusal_of(error)

    async def look_again(self, spec: PrefixSpec) -> PrefixSpec | None:
        """Returns what may take the place of a prefix that the engine could not read; None if nothing may.

        That is the same prefix if its files were read again now: they were being written when the engine read them.

        Raises:
            VLLMNotFoundError: If there is no adapter of this name any more.
            PrefixRequestError: If there is another one, which cannot be served.
        """
        self._resolver.expire(spec.name)
        adapter = await self.resolve(spec.name)
        if adapter is None:
            raise VLLMNotFoundError(f"The model `{spec.name}` does not exist.")
        if isinstance(adapter, ErrorResponse):
            raise PrefixRequestError(adapter.error.message)
        # The prompt was rendered behind the opening of the one before.
        if adapter.spec.opening != spec.opening or (adapter.spec == spec and adapter.files is None):
            return None
        return adapter.spec

    def spec(self, name: str | None) -> PrefixSpec | None:
        """Returns the adapter called `name`; None if there is none, or none that was read yet."""
        adapter = self._registry.get(name) if name else None
        return None if adapter is None or not adapter.is_verified else adapter.spec

    def has(self, name: str) -> bool:
        """Returns whether there is an adapter of this name, which may not be read yet."""
        return self._registry.get(name) is not None

    def request(self, name: str | None) -> PrefixAdapterRequest | None:
        """Returns the `lora_request` for the adapter called `name`; None if there is none, or none that was read yet."""
        spec = None if name in self.base_names else self.spec(name)
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

    async def cards(self) -> bytes:
        """Returns the entries of `/v1/models` in JSON: what is loaded or named, and what else requests may use."""
        # In a thread: it may look into thousands of folders.
        return await asyncio.get_running_loop().run_in_executor(self._listing, self._cards.rendered)

    async def load(
        self,
        name: str,
        path: str,
        *,
        draft_path: str | None = None,
        base_model_name: str | None = None,
        pinned: bool | None = None,
        replace: bool,
    ) -> ErrorResponse | str:
        """Reads, checks and adds an adapter. If anything fails, nothing changes.

        Args:
            name: The name that requests use.
            path: Folder or Hub repository, as on the command line.
            draft_path: The prefix for the draft model, if any.
            base_model_name: The served model that `/v1/models` lists as its parent; the first one by default.
            pinned: Whether it stays in memory; by default, as the one that it replaces, or as the command line says.
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
        if not replace and self.has(name):
            return taken
        try:
            check_name(name)
            # In a thread: it reads and hashes a file, or downloads it, and must not block running requests.
            async with self._load_limit:
                if pinned is None and (known := self._registry.get(name)) is not None:
                    pinned = known.spec.pinned
                option = AdapterOption(name, path, base_model_name, draft_path or None, pinned)
                adapter = await asyncio.to_thread(open_adapter, option, self._config, self._registry)
            await self._prepare(adapter)
        except PrefixServeError as error:
            return refusal_of(error)
        try:
            publish(adapter, self._registry, self._config, replace=replace)
        except NameTakenError:
            return taken
        self._resolver.forget(name)
        return f"Success: Prefix adapter '{name}' added successfully."

    def unload(self, name: str) -> ErrorResponse | str:
        """Removes an adapter. New requests for it get 404; running requests finish."""
        if not name:
            return refusal("'prefix_name' needs to be provided to unload a prefix adapter.")
        try:
            self._registry.remove(name)
        except KeyError:
            return refusal(f"The prefix adapter '{name}' cannot be found.", HTTPStatus.NOT_FOUND)
        self._resolver.forget(name)
        logger.info("Removed prefix adapter: name '%s'", name)
        return f"Success: Prefix adapter '{name}' removed successfully."

    def _other_names(self) -> set[str]:
        return {*(base.name for base in self._models.base_model_paths), *self._models.lora_requests}

    async def _resolved(self, name: str) -> Adapter | None:
        self._loop = asyncio.get_running_loop()
        # Shared by all requests for this name: one that is cancelled leaves it running.
        return await asyncio.shield(asyncio.wrap_future(self._resolver.start(name)))

    async def _warm_up_at_start(self, names: Sequence[str]) -> None:
        found = await asyncio.gather(*(self._resolved(name) for name in names))
        if missing := [name for name, adapter in zip(names, found, strict=True) if adapter is None]:
            raise PrefixServeError(
                f"--prefix-adapter-warmup names {missing[0]!r}, and there is no such adapter; this server has: "
                f"{names_in(self._registry)}."
            )
        await warm_up(self._engine, [adapter.spec for adapter in found if adapter is not None])

    async def _prepare(self, adapter: Adapter) -> None:
        """Makes the engine ready for an adapter that was read.

        Raises:
            PrefixServeError: If the engine cannot load it.
        """
        await base_lora.load(self._engine, [adapter.spec])
        if self._started and self._warm is True:
            await warm_up(self._engine, [adapter.spec])

    def _prepare_in_thread(self, adapter: Adapter) -> None:
        loop = self._loop
        assert loop is not None
        prepared = asyncio.run_coroutine_threadsafe(self._prepare(adapter), loop)
        while not prepared.done():
            wait([prepared], timeout=1.0)
            # A thread that waits would keep a server that shuts down from its end.
            if not loop.is_running() and not prepared.done():
                raise PrefixServeError(f"Prefix adapter {adapter.spec.name!r} was not loaded: the server shuts down.")
        prepared.result()


_ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "InvalidUserInput",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
}


def refusal_of(error: PrefixServeError) -> ErrorResponse:
    """Returns what is wrong with an adapter, in the form of vLLM's endpoints."""
    missing = isinstance(error, AdapterNotFoundError)
    return refusal(str(error), HTTPStatus.NOT_FOUND if missing else HTTPStatus.BAD_REQUEST)


def refusal(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ErrorResponse:
    """Returns an error in the form of vLLM's endpoints."""
    return create_error_response(message=message, err_type=_ERROR_TYPES[status], status_code=status)
