"""Prefixes of a front end that this plugin is not part of, such as vLLM's in Rust: found and checked in the engine.

Such a front end knows LoRA adapters only. It loads one with a call to the engine (`add_lora`), and then sends its name, number
and path with each of its requests. If it is a prefix, the workers get no LoRA adapter; the engine keeps what its requests
need to know of it, and attaches that to them, after the checks that this plugin makes in Python's front end. A request
that cannot be served is refused alone.

Requests from Python's front end were checked there, and have their prefix with them already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from vllm_plugin.adapters import base_lora
from vllm_plugin.adapters.adapter_kinds import is_prefix_path
from vllm_plugin.adapters.request import PrefixAdapterRequest
from vllm_plugin.adapters.runtime_loading import adapter_of, as_prefix_request, remove
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end import requests
from vllm_plugin.kv_transfer_config import ADAPTERS
from vllm_plugin.logger import logger
from vllm_plugin.request_errors import PrefixRequestError

# A request may be on its way while its adapter is unloaded or replaced. So many of these are kept.
MAX_UNLOADED = 1024
_ATTRIBUTE = "prefix_adapters"


class EngineAdapters:
    """The prefixes that front ends have loaded into one engine as LoRA adapters.

    Args:
        vllm_config: The engine's config.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._config = vllm_config
        # By number: the path that its requests name, and the prefix. What is loaded in place of another one has its number.
        self._loaded: dict[int, tuple[str, PrefixSpec]] = {}
        # By number and path. The least recently unloaded first.
        self._unloaded: OrderedDict[tuple[int, str], PrefixSpec] = OrderedDict()
        # The engine runs its steps meanwhile.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefix-adapters-engine")

    def load(self, request: Any) -> Future[bool] | None:
        """Reads, checks and adds what a front end loads as a LoRA adapter, if it is a prefix.

        Args:
            request: vLLM's `LoRARequest`.

        Returns:
            A future that gives True, or raises `PrefixRequestError` if the prefix cannot be served; None for a LoRA adapter,
            which is vLLM's.
        """
        try:
            wanted = as_prefix_request(request, self._config)
        except FileNotFoundError:
            # This engine runs on another machine than the server, where the table of prefixes is.
            return None
        if not isinstance(wanted, PrefixAdapterRequest):
            if self._config.lora_config is not None:
                # It may take the place of a prefix.
                self.unload(request.lora_int_id)
                return None
            # Nothing else can be served here. Whoever opens it says what it is.
            wanted = PrefixAdapterRequest(
                request.lora_name, lora_path=request.lora_path, load_inplace=request.load_inplace
            )
        return self._pool.submit(self._load, wanted, request.lora_int_id, request.lora_path)

    def unload(self, number: int) -> bool:
        """Removes a prefix by its number. Requests that have it keep it.

        Returns:
            Whether there was one.
        """
        spec = self._keep_unloaded(number)
        if spec is None:
            return False
        del self._loaded[number]
        self._remove_name(spec.name)
        logger.info("Removed prefix adapter: name '%s'", spec.name)
        return True

    def prepare(self, request: Any) -> None:
        """Checks a request before the engine takes it, and attaches its prefix if it has one.

        Args:
            request: The `EngineCoreRequest`.

        Raises:
            PrefixRequestError: If it cannot be served.
        """
        # It is passed on only to free what a connector holds for it, and never runs.
        if request.abort_immediately:
            return
        params = request.pooling_params if request.sampling_params is None else request.sampling_params
        transfer = requests.transfer_of(params)
        # Python's front end has attached and checked it. No client can: what it sends is JSON, which has no bytes.
        if isinstance(transfer, Mapping) and isinstance(transfer.get(ADAPTERS), bytes):
            return
        base_lora.check(params, self._config)
        if request.lora_request is None and transfer is None and request.cache_salt is None:
            # The common request beside adapters.
            return
        spec = None if request.lora_request is None else self._spec_of(request.lora_request)
        max_model_len = self._config.model_config.max_model_len
        requests.check(spec, requests.Prompt.of_request(request), params, max_model_len)
        if spec is not None:
            request.lora_request = None
            num_engines = self._config.parallel_config.data_parallel_size
            requests.attach_prefix(request, spec, max_model_len, num_engines)

    def _load(self, wanted: PrefixAdapterRequest, number: int, path: str) -> bool:
        spec = adapter_of(wanted, self._config)
        if (reason := _unservable(spec)) is not None:
            self._remove_name(spec.name)
            raise PrefixRequestError(reason)
        self._keep_unloaded(number)
        self._loaded[number] = path, spec
        return True

    def _keep_unloaded(self, number: int) -> PrefixSpec | None:
        """Returns the prefix of a number, if there is one, after it was put among those that are no longer loaded."""
        entry = self._loaded.get(number)
        if entry is None:
            return None
        path, spec = entry
        self._unloaded[number, path] = spec
        self._unloaded.move_to_end((number, path))
        if len(self._unloaded) > MAX_UNLOADED:
            self._unloaded.popitem(last=False)
        return spec

    def _remove_name(self, name: str) -> None:
        # Another engine of this server may have been faster.
        with suppress(PrefixServeError):
            remove(name, self._config)

    def _spec_of(self, lora: Any) -> PrefixSpec | None:
        """Returns the prefix that a request names as a LoRA adapter; None if it is one."""
        number, path = lora.lora_int_id, lora.lora_path
        loaded = self._loaded.get(number)
        spec = loaded[1] if loaded is not None and loaded[0] == path else self._unloaded.get((number, path))
        # Workers would load a prefix as a LoRA adapter, and the engine would end.
        if spec is None and (self._config.lora_config is None or is_prefix_path(path)):
            raise PrefixRequestError(
                f"The prefix adapter {lora.lora_name!r} is not loaded in this engine; load it again, by POST "
                "/v1/load_lora_adapter."
            )
        return spec


def adapters_of(engine: Any) -> EngineAdapters:
    """Returns the prefixes that front ends have loaded into a vLLM `EngineCore` as LoRA adapters."""
    # Its input thread asks as well.
    adapters: EngineAdapters = vars(engine).get(_ATTRIBUTE) or vars(engine).setdefault(
        _ATTRIBUTE, EngineAdapters(engine.vllm_config)
    )
    return adapters


def _unservable(spec: PrefixSpec) -> str | None:
    """Returns why requests for a prefix need Python's front end; None if they do not."""
    needs = "and vLLM's Rust front end cannot serve it; unset VLLM_USE_RUST_FRONTEND."
    if spec.opening is not None:
        # Chats would be rendered with the model's own template: fluent, and wrong.
        return (
            f"Prefix adapter {spec.name!r} stands for the opening of a chat and brings its own chat template, {needs}"
        )
    if spec.lora_path is not None:
        return f"Prefix adapter {spec.name!r} was trained on a LoRA adapter, which has to be loaded with it, {needs}"
    return None
