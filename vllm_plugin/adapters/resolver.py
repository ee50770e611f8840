"""From the name in a request to an adapter that can be served: read with its first request, and found where one may look for it.

Three kinds of adapters: one that is verified is used as it is; one that the operator has named is read with its first request;
and one that lies in a source (`sources.py`) is found by its name, and looked at again from time to time.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from vllm_plugin.adapters.adapter_kinds import holds_prefix
from vllm_plugin.adapters.file_state import folder_state
from vllm_plugin.adapters.loading import load_known, open_adapter, verify_adapter
from vllm_plugin.adapters.options import AdapterOption, is_name
from vllm_plugin.adapters.refusals import Refusals, without_frames
from vllm_plugin.adapters.registry import Adapter, Registry
from vllm_plugin.adapters.single_flight import SingleFlight
from vllm_plugin.adapters.sources import Found, Source, make_sources
from vllm_plugin.adapters.startup_log import log_loaded
from vllm_plugin.adapters.whole_files import read_whole
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.kv_transfer_config import FOLDERS, OWNERS, settings_in
from vllm_plugin.logger import logger

# Each call holds the tensors of an adapter while it is read.
MAX_CONCURRENT_LOADS = 4
# The state of an adapter that the operator has named, and which was refused, is looked at this often.
_RETRY_SECONDS = 1.0
# A source that cannot be asked is asked again after this time at most.
_MAX_RETRY_SECONDS = 30.0


class _Watched(NamedTuple):
    """An adapter of a source that this process has looked at: until when it needs no further look, and where it lies."""

    until: float
    source: Source


class Resolver:
    """Finds the adapters of one engine by their names, in threads of its own.

    Args:
        registry: The table of adapters that all processes of a server share.
        vllm_config: The engine's config.
        sources: Where adapters are found that the table does not have.
        prepare: Runs with each adapter that was read, before any request may use it. Raises `PrefixServeError` if the engine
            cannot take it.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        registry: Registry,
        vllm_config: Any,
        sources: Sequence[Source] | None = None,
        prepare: Callable[[Adapter], None] = lambda adapter: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._config = registry, vllm_config
        self._sources = sources_in(vllm_config) if sources is None else sources
        self._prepare, self._clock = prepare, clock
        self._flights: SingleFlight[Adapter | None] = SingleFlight(MAX_CONCURRENT_LOADS)
        # Looks at adapters in local folders, for which requests wait, do not wait for downloads.
        self._looks: SingleFlight[Adapter | None] = SingleFlight(MAX_CONCURRENT_LOADS)
        self._watched: dict[str, _Watched] = {}
        self._refusals = Refusals(clock=lambda: self._clock())
        # The lists of the sources, and all of them in one.
        self._names: tuple[list[list[str]], list[str]] | None = None

    def ready(self, name: str) -> Adapter | None:
        """Returns an adapter that can be used as it is; None if `start` has to find out. Reads the clock at most."""
        adapter = self._registry.get(name)
        if adapter is None or not adapter.is_verified:
            return None
        if adapter.files is None:
            return adapter
        watched = self._watched.get(name)
        if watched is None:
            return None
        if self._clock() >= watched.until:
            if watched.source.is_local:
                return None
            self.start(name)
        return adapter

    def start(self, name: str) -> Future[Adapter | None]:
        """Finds the adapter of a name, once for all who ask meanwhile.

        The future gives None if nothing has this name, and raises `PrefixServeError` if what has it cannot be served. It is
        shared: do not cancel it.
        """
        if (answer := self._answer_at_once(name)) is not None:
            return answer
        watched = self._watched.get(name)
        flights = self._looks if watched is not None and watched.source.is_local else self._flights
        return flights.start(name, lambda: self._resolve(name))

    def resolve(self, name: str) -> Adapter | None:
        """Returns the adapter of a name; None if there is none. May read files, and wait for other threads.

        Raises:
            PrefixServeError: If it cannot be served.
        """
        return self.ready(name) or self.start(name).result()

    @property
    def has_sources(self) -> bool:
        """Whether there may be adapters that the table does not have."""
        return bool(self._sources)

    def names(self) -> list[str]:
        """Returns the names in the sources: the same list, until they change. May take seconds."""
        lists = [source.names() for source in self._sources]
        if self._names is None or any(one is not other for one, other in zip(self._names[0], lists, strict=True)):
            self._names = lists, list(dict.fromkeys(name for names in lists for name in names))
        return self._names[1]

    def remove_gone(self, names: Sequence[str]) -> None:
        """Removes the adapters whose folders are gone: there may be no further request for them that would notice.

        One in remote storage waits for its next request.

        Args:
            names: What the sources list: only other names are looked for.
        """
        listed = set(names)
        for adapter in self._registry.adapters():
            is_found = adapter.files is not None and os.path.isabs(adapter.spec.source)
            if is_found and adapter.spec.name not in listed and not self._lies_in_a_folder(adapter.spec.name):
                self._drop(adapter)

    def expire(self, name: str) -> None:
        """Makes the next request look at the files of an adapter, however short ago the last one did."""
        self._watched.pop(name, None)
        self._refusals.expire(name)

    def forget(self, name: str) -> None:
        """Forgets why a name was refused: it was loaded or unloaded."""
        self._refusals.forget(name)

    def _answer_at_once(self, name: str) -> Future[Adapter | None] | None:
        """Returns the answer to a name that nothing can have, or that was refused just now; None for any other."""
        adapter, refused = self._registry.get(name), self._refusals.standing(name)
        answer: Future[Adapter | None] = Future()
        # What clients send as a name may be as long as a request, and is not remembered.
        if adapter is None and not (self._sources and is_name(name)):
            answer.set_result(None)
        elif refused is None or (adapter is not None and adapter.is_verified):
            return None
        elif refused.error is None:
            answer.set_result(None)
        else:
            answer.set_exception(without_frames(refused.error))
        return answer

    def _resolve(self, name: str) -> Adapter | None:
        while True:
            began, adapter = self._clock(), self._registry.get(name)
            if adapter is None or adapter.files is not None:
                new, source = self._look_for(name, adapter)
                if new is None or source is None:
                    return None
                self._watched[name] = _Watched(began + source.refresh_seconds, source)
            else:
                new = adapter if adapter.is_verified else self._verify(adapter)
            # If another process was faster, its adapter is looked at.
            if new is adapter or self._publish(adapter, new):
                self._refusals.forget(name)
                return new

    def _publish(self, old: Adapter | None, new: Adapter) -> bool:
        if not self._registry.exchange(old, new):
            return False
        # An adapter that the operator has named was logged when it was registered.
        if new.files is not None and (old is None or old.spec != new.spec):
            log_loaded(new, self._registry.block_size(), self._config)
        return True

    def _verify(self, adapter: Adapter) -> Adapter:
        """Reads an adapter that the operator has named."""
        name, state = adapter.spec.name, folder_state(adapter.spec.path)
        self._refusals.raise_again(name, state, _RETRY_SECONDS)
        try:
            new = verify_adapter(adapter, self._config, self._registry)
            self._prepare(new)
        except PrefixServeError as error:
            self._refusals.add(name, error, state, _RETRY_SECONDS)
            raise
        return new

    def _look_for(self, name: str, adapter: Adapter | None) -> tuple[Adapter | None, Source | None]:
        """Returns the adapter of a name in its present state, and where it lies.

        Args:
            name: The name.
            adapter: What the table has, which is returned if its files are as they were.
        """
        error: PrefixServeError | None = None
        retry = _RETRY_SECONDS
        for source in self._sources:
            try:
                found = source.find(name)
            except PrefixServeError as problem:
                watched = self._watched.get(name)
                if adapter is not None and not source.is_local and (watched is None or watched.source is source):
                    # The storage cannot be asked now.
                    logger.warning("%s It is served as it was.", problem)
                    return adapter, source
                if error is None:
                    error, retry = problem, min(source.refresh_seconds, _MAX_RETRY_SECONDS)
                continue
            if found is None:
                continue
            if adapter is not None and adapter.files == found.state:
                return adapter, source
            self._refusals.raise_again(name, found.state, source.refresh_seconds)
            # Other kinds of adapters are vLLM's.
            if not holds_prefix(found.path):
                continue
            try:
                return self._read(name, found, adapter), source
            except PrefixServeError as problem:
                self._drop(adapter)
                self._refusals.add(name, problem, found.state, source.refresh_seconds)
                raise
        self._drop(adapter)
        self._refusals.add(name, error, None, retry)
        if error is not None:
            raise error
        return None, None

    def _read(self, name: str, found: Found, old: Adapter | None) -> Adapter:
        option = AdapterOption(name, found.path)
        opened = read_whole(name, found.path, lambda: open_adapter(option, self._config, self._registry, load_known))
        spec = dataclasses.replace(opened.spec, source=found.source)
        new = dataclasses.replace(opened, spec=spec, files=found.state)
        # Files that were touched, or copied again, hold what they held.
        if old is None or old.spec != new.spec:
            self._prepare(new)
        return new

    def _lies_in_a_folder(self, name: str) -> bool:
        for source in self._sources:
            # What may not be read is no more served than what is not there.
            with suppress(PrefixServeError):
                if source.is_local and source.find(name) is not None:
                    return True
        return False

    def _drop(self, adapter: Adapter | None) -> None:
        """Removes an adapter whose files are gone, or are another thing."""
        if adapter is None:
            return
        self._watched.pop(adapter.spec.name, None)
        if self._registry.exchange(adapter, None):
            logger.info("Removed prefix adapter: name '%s'", adapter.spec.name)


def sources_in(vllm_config: Any) -> list[Source]:
    """Returns the sources in an engine's config."""
    settings = settings_in(vllm_config.kv_transfer_config) or {}
    return make_sources(settings.get(FOLDERS, ()), settings.get(OWNERS, ()))
