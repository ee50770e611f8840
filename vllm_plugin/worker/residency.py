"""Which adapters have their prefix in which pool of a worker, told as changes: there may be thousands of them.

A pool holds prefixes by content. Several names may have the same content, and a name gets another one when its adapter is
replaced; it then counts for the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Pool(Protocol):
    """What is read of a pool: what it holds, and what it took in or dropped since it was last asked."""

    def __contains__(self, digest: str) -> bool: ...

    def take_changed(self) -> set[str]: ...


class Residency:
    """The names of the prefixes in the pools of a worker."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._names: dict[str, set[str]] = {}
        # Names that came, or got another content, since the last changes.
        self._new: set[str] = set()
        self._resident: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self._digests)

    def name(self, name: str, digest: str) -> None:
        """Notes the content of an adapter. Called for each load."""
        if self._digests.get(name) != digest:
            self._forget(name)
            self._digests[name] = digest
            self._names.setdefault(digest, set()).add(name)
            self._new.add(name)

    def take_changes(self, tiers: Mapping[str, Pool]) -> dict[str, dict[str, int]]:
        """Returns 1 for each adapter that came into a tier since the last call, and 0 for each that left, by tier."""
        changed = set().union(*(pool.take_changed() for pool in tiers.values()))
        names = self._new.union(*(self._names.get(digest, ()) for digest in changed))
        self._new.clear()
        changes: dict[str, dict[str, int]] = {}
        for name in names:
            digest = self._digests[name]
            for tier, pool in tiers.items():
                is_there = digest in pool
                if is_there != ((tier, name) in self._resident):
                    (self._resident.add if is_there else self._resident.discard)((tier, name))
                    changes.setdefault(tier, {})[name] = int(is_there)
            if not any(digest in pool for pool in tiers.values()):
                self._forget(name)
        return changes

    def _forget(self, name: str) -> None:
        digest = self._digests.pop(name, None)
        if digest is not None:
            names = self._names[digest]
            names.discard(name)
            if not names:
                del self._names[digest]
