"""The prefixes of a worker: opened when a request first needs one, and kept on the device within a budget.

A prefix is copied out of its file. A memory mapping would change with the file, and truncating the file would crash the
worker. So the digest that is checked when a prefix is opened is the digest of the bytes that are served.

Shape suffixes: L layers of one stack, P virtual tokens of one prefix, H KV heads on this worker, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from peft_prefix_ext.checkpoint.format import LayerState, state_shapes_of
from vllm_plugin.adapters.loading import reload
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.adapters.validation import check_states
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.logger import logger
from vllm_plugin.worker.cache_layers import LayerStack, shard
from vllm_plugin.worker.device_copy import to_device
from vllm_plugin.worker.residency import Residency
from vllm_plugin.worker.state_layers import StateLayer, model_states
from vllm_plugin.worker.state_layout import part_of_rank

# Host memory for prefixes that are not on the device, as a multiple of the device memory for prefixes.
HOST_FACTOR = 8


@dataclass(frozen=True, slots=True)
class PrefixKV:
    """One prefix on one worker.

    Args:
        keys_LPHD: Keys in the model's dtype, per stack.
        values_LPHD: Values in the model's dtype, per stack.
        states: For each recurrent layer, one block of each of its cache tensors; empty if they start from zero.
    """

    keys_LPHD: tuple[torch.Tensor, ...]
    values_LPHD: tuple[torch.Tensor, ...]
    states: tuple[tuple[torch.Tensor, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in (self.keys_LPHD, self.values_LPHD, *self.states) for tensor in tensors)

    def to(self, device: torch.device) -> PrefixKV:
        keys, values, *states = (
            tuple(to_device(tensor, device) for tensor in tensors)
            for tensors in (self.keys_LPHD, self.values_LPHD, *self.states)
        )
        return PrefixKV(keys, values, tuple(states))


class LRUPool:
    """A pool of prefixes of limited size, which drops the least recently used ones, and pinned ones last.

    Args:
        capacity: Its size in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._prefixes: OrderedDict[str, PrefixKV] = OrderedDict()
        self._changed: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, digest: str) -> PrefixKV | None:
        if digest in self._prefixes:
            self._prefixes.move_to_end(digest)
        return self._prefixes.get(digest)

    def size_of(self, digests: Iterable[str]) -> int:
        """Returns the bytes of those of these prefixes that are in the pool."""
        return sum(self._prefixes[digest].nbytes for digest in digests if digest in self._prefixes)

    def has_room(self, nbytes: int) -> bool:
        return self.used + nbytes <= self.capacity

    def make_room(self, nbytes: int, keep: Container[str] = (), last: Container[str] = ()) -> bool:
        """Drops the least recently used prefixes until `nbytes` fit: none in `keep`, and those in `last` after all others.

        Returns:
            Whether they fit. If not, nothing is dropped.
        """
        others = [digest for digest in self._prefixes if digest not in keep]
        # A stable sort: by use within both parts.
        others.sort(key=lambda digest: digest in last)
        if self.used - sum(self._prefixes[digest].nbytes for digest in others) + nbytes > self.capacity:
            return False
        for digest in others:
            if self.has_room(nbytes):
                break
            self.used -= self._prefixes.pop(digest).nbytes
            self._changed.add(digest)
        return True

    def put(self, digest: str, prefix: PrefixKV) -> None:
        """Adds a prefix; there must be room for it."""
        self._prefixes[digest] = prefix
        self._changed.add(digest)
        self.used += prefix.nbytes

    def clear(self) -> None:
        self._changed.update(self._prefixes)
        self._prefixes.clear()
        self.used = 0

    def take_changed(self) -> set[str]:
        """Returns the prefixes that came or were dropped since the last call."""
        changed, self._changed = self._changed, set()
        return changed


class PrefixManager:
    """Opens prefixes and keeps them: on the device as long as they fit, else on the host.

    Args:
        stacks: The layers with a KV cache on this worker.
        tp_rank: Tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
        dtype: The model's dtype.
        device: The device of the KV cache.
        device_memory: Memory for prefixes there, in bytes. A prefix that does not fit is copied from the host each
            time.
        state_layers: The recurrent layers on this worker.
        without: What becomes of the requests of a prefix that cannot be read, for the log.
    """

    def __init__(
        self,
        stacks: Sequence[LayerStack],
        *,
        tp_rank: int,
        tp_size: int,
        dtype: torch.dtype,
        device: torch.device,
        device_memory: int,
        state_layers: Sequence[StateLayer] = (),
        without: str = "its requests fail",
    ) -> None:
        self.stacks, self.device = stacks, device
        self._state_layers = state_layers
        self._tp_rank, self._tp_size = tp_rank, tp_size
        self._dtype = dtype
        self._without = without
        self._on_device = LRUPool(device_memory)
        # The digests of the prefixes that make room for no others.
        self._pinned: frozenset[str] = frozenset()
        self._told_of_pinned = False
        # On CPU, the device is the host.
        self._on_host = LRUPool(0 if device.type == "cpu" else HOST_FACTOR * device_memory)
        self._residency = Residency()

    @property
    def num_resident(self) -> int:
        """The number of prefixes on the device."""
        return len(self._on_device)

    def gather(self, specs: Sequence[PrefixSpec]) -> list[PrefixKV | None]:
        """Returns the prefixes that one step needs, each on the device or on the host.

        None stands for a prefix that cannot be read; the log says why.
        """
        needed = {spec.digest: spec for spec in specs}
        for spec in specs:
            self._residency.name(spec.name, spec.digest)
        # By content, so that a prefix with two names is kept once.
        found = {digest: self._get(spec, needed) for digest, spec in needed.items()}
        return [found[spec.digest] for spec in specs]

    def take_residency(self) -> dict[str, dict[str, int]]:
        """Returns 1 for each adapter that came into a tier since the last call, and 0 for each that left, by tier."""
        return self._residency.take_changes({"device": self._on_device, "host": self._on_host})

    def pin(self, digests: frozenset[str]) -> None:
        """Keeps these prefixes, and no others, from making room for prefixes that are not pinned."""
        self._pinned = digests

    def release_device_memory(self) -> None:
        """Drops the prefixes on the device, unless the device is the host, which has no other copy of them."""
        if self.device.type != "cpu":
            self._on_device.clear()

    def open(self, spec: PrefixSpec) -> PrefixKV:
        """Reads a prefix into host memory.

        Raises:
            PrefixServeError: If it cannot be read, has changed since it was opened, or does not fit the layers.
        """
        checkpoint = reload(spec)
        keys, values = [], []
        for stack in self.stacks:
            parts = [
                shard(spec.name, checkpoint.layers[layer.index], layer, self._tp_rank, self._tp_size)
                for layer in stack.layers
            ]
            keys.append(torch.stack([part.key for part in parts]).to(self._dtype))
            values.append(torch.stack([part.value for part in parts]).to(self._dtype))
        states = self._states(spec.name, checkpoint.states) if checkpoint.states else ()
        return PrefixKV(tuple(keys), tuple(values), states)

    def _states(self, name: str, states: Mapping[int, LayerState]) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Returns the states of a prefix as this worker's cache has them."""
        # Other workers may have other layers of the prefix.
        own = {layer.index: states[layer.index] for layer in self._state_layers if layer.index in states}
        check_states(name, state_shapes_of(own), model_states(self._state_layers))
        return tuple(
            part_of_rank(own[layer.index], layer.layout, layer.shapes, layer.dtypes, self._tp_rank, self._tp_size)
            for layer in self._state_layers
            if layer.layout is not None
        )

    def _make_room(self, pool: LRUPool, digest: str, nbytes: int, needed: Collection[str]) -> bool:
        """Makes room in a pool for a prefix, beside those that are needed in this step."""
        if digest not in self._pinned:
            return pool.make_room(nbytes, self._pinned.union(needed) if self._pinned else needed)
        is_full = pool is self._on_device and pool.size_of(self._pinned) + nbytes > pool.capacity
        if is_full and not self._told_of_pinned:
            self._told_of_pinned = True
            logger.warning(
                "The pinned prefixes do not fit on the device together (%.2f GiB): those used last stay there; raise "
                "--prefix-adapter-device-memory, or pin fewer.",
                pool.capacity / 2**30,
            )
        return pool.make_room(nbytes, needed, last=self._pinned)

    def _get(self, spec: PrefixSpec, keep: Collection[str]) -> PrefixKV | None:
        prefix = self._on_device.get(spec.digest)
        if prefix is not None:
            return prefix
        prefix = self._on_host.get(spec.digest)
        try:
            if prefix is None:
                prefix = self.open(spec)
                if self._make_room(self._on_host, spec.digest, prefix.nbytes, keep):
                    self._on_host.put(spec.digest, prefix)
        except PrefixServeError as error:
            logger.error("%s %s.", error, self._without.capitalize())
            return None
        except Exception:
            # Any error affects only requests with this prefix. The engine continues.
            logger.exception("Prefix adapter %r cannot be read; %s.", spec.name, self._without)
            return None
        if self._make_room(self._on_device, spec.digest, prefix.nbytes, keep):
            try:
                prefix = prefix.to(self.device)
            except torch.OutOfMemoryError:
                self._on_device.capacity = self._on_device.used
                logger.warning(
                    "Out of device memory: only %d bytes of prefixes stay on the device, and others are copied from the host; "
                    "lower --prefix-adapter-device-memory or --gpu-memory-utilization.",
                    self._on_device.capacity,
                )
            else:
                self._on_device.put(spec.digest, prefix)
        return prefix
