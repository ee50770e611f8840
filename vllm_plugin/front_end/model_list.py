"""The entries of `/v1/models` for prefixes: of tens of thousands, without holding up the requests of that time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

from vllm_plugin.adapters.registry import Adapter, Registry
from vllm_plugin.adapters.resolver import Resolver

# Encoding holds Python's lock: other threads run between the parts.
_PART = 500


class ModelCards:
    """The entries of the adapters, in the form of those of LoRA modules. They are made anew when an adapter comes or goes.

    Args:
        models: vLLM's `OpenAIServingModels`.
        registry: The adapters that are loaded, or named by the operator.
        resolver: Knows what else requests may use.
    """

    def __init__(self, models: Any, registry: Registry, resolver: Resolver) -> None:
        self._models, self._registry, self._resolver = models, registry, resolver
        self._lock = threading.Lock()
        self._known: tuple[Any, list[str], bytes] | None = None

    def rendered(self) -> bytes:
        """Returns the entries in JSON, separated by commas. Takes a while if there are many, so call it in a thread."""
        with self._lock:
            version, names = self._registry.version, self._resolver.names()
            # The same list, if nothing has changed in the sources.
            if self._known is None or self._known[0] != version or self._known[1] is not names:
                self._resolver.remove_gone(names)
                version = self._registry.version
                self._known = version, names, self._render(self._registry.adapters(), names)
            return self._known[2]

    def _render(self, adapters: Sequence[Adapter], names: Sequence[str]) -> bytes:
        rows = list(self._rows(adapters, names))
        parts = (rows[start : start + _PART] for start in range(0, len(rows), _PART))
        return b",".join(msgspec.json.encode(part)[1:-1] for part in parts)

    def _rows(self, adapters: Sequence[Adapter], names: Sequence[str]) -> Iterator[dict[str, Any]]:
        base = self._models.base_model_paths[0].name
        served = {each.name for each in self._models.base_model_paths}
        # vLLM's own class takes ten times as long.
        card = ModelCard(id="", permission=[ModelPermission()]).model_dump()
        loaded = {adapter.spec.name for adapter in adapters}
        for adapter in adapters:
            named = adapter.base_model_name
            yield {
                **card,
                "id": adapter.spec.name,
                "root": adapter.spec.source,
                "parent": named if named in served else base,
            }
        for name in names:
            if name not in loaded:
                yield {**card, "id": name, "parent": base}
