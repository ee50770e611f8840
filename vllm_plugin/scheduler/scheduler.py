"""The scheduler's side of a prefix: which tokens stand for it, and what to load where. No tensors.

Inside the engine a request's prompt starts with p placeholders. Either vLLM's own prefix cache finds the blocks they
fill, or `PrefixScheduler` reports that they can be loaded. In both cases the model never runs them. With disaggregated
prefill, another connector loads the whole prompt from the server that prefilled it, where the placeholders are as well.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters import handover
from vllm_plugin.adapters.spec import PrefixSpec, unpack
from vllm_plugin.kv_transfer_config import ADAPTERS
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.metrics import PrefixStats
from vllm_plugin.scheduler import media
from vllm_plugin.scheduler.handovers import Handovers
from vllm_plugin.scheduler.load_failures import BlockIds, RecentBlocks
from vllm_plugin.scheduler.other_connectors import OtherConnectors
from vllm_plugin.scheduler.pinned_prefixes import PinnedPrefixes
from vllm_plugin.scheduler.prefill_stats import RealPrefillStats

if TYPE_CHECKING:
    from vllm.v1.request import Request

# How many lists of block hashes are kept, one per prefix and client salt; each takes some kilobytes at most.
MAX_HASHED_PREFIXES = 4096


class PrefixScheduler:
    """The bookkeeping of one engine. It knows an adapter only from the requests that use it.

    Args:
        block_size: Tokens per block; the least common multiple if groups of layers differ.
        hands_over: Whether another connector takes over what another server has prefilled, or hands it over.
    """

    def __init__(self, block_size: int, *, hands_over: bool = False) -> None:
        self.stats = PrefixStats()
        self.recent_blocks = RecentBlocks()
        self.other_connectors = OtherConnectors()
        # None before vLLM has made its cache manager.
        self.pinned: PinnedPrefixes | None = None
        self._block_size = block_size
        self._handovers = Handovers() if hands_over else None
        # The least recently used first.
        self._hashes: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()
        self._specs: dict[str, PrefixSpec] = {}
        self._num_loadable: dict[str, int] = {}
        self._loads: list[PrefixLoad] = []
        # Requests of this step that vLLM scheduled without the load, since its own cache goes beyond the prefix, or
        # another connector's load does.
        self._loaded_by_others: list[tuple[Request, PrefixSpec]] = []
        # Requests of this step whose flag `accept_load` has cleared.
        self._skips_prefix_cache: list[Request] = []

    def add_placeholders(self, request: Request) -> None:
        """Inserts the placeholders before a new request's prompt and salts its block hashes."""
        # vLLM passes a request that the front end refused here as well, aborted and with the client's own parameters,
        # so that a connector can release what it holds for the request. It never runs.
        packed = _transfer(request).get(ADAPTERS)
        spec = None if packed is None or getattr(request, "abort_immediately", False) else unpack(packed)
        p = 0 if spec is None else spec.num_virtual_tokens
        if self._handovers is not None:
            self._handovers.check(request, p + request.num_prompt_tokens)
        if spec is None:
            return
        self._specs[request.request_id] = spec
        request.cache_salt = spec.salt(request.cache_salt)
        request.prefill_stats = RealPrefillStats(p)
        if getattr(request.sampling_params, "prompt_logprobs", None) is not None:
            # Each real token has to run, whatever the client asks for.
            request.skip_reading_prefix_cache = True
        prompt = request.prompt_token_ids
        assert prompt is not None
        placeholders = [media.placeholder(prompt, request.mm_features)] * p
        # Before anything is hashed: the hash of a block says which media stand in it, and where.
        request.mm_features = media.moved(request.mm_features, p)
        request.block_hashes[:] = self._prefix_hashes(request, p)
        request._all_token_ids[:0] = placeholders
        # A new list: an engine in the front end's process shares the prompt with it.
        request.prompt_token_ids = placeholders + prompt
        request.num_prompt_tokens += p
        request.update_block_hashes()
        self.stats.add("requests", spec.name)

    def num_loadable(self, request: Request, num_computed: int) -> int:
        """Returns how many tokens after the `num_computed` cached ones can be loaded."""
        spec = self._specs.get(request.request_id)
        if spec is None:
            return 0
        missing = self._num_loadable[request.request_id] = max(0, spec.num_virtual_tokens - num_computed)
        # vLLM takes the first connector with an answer, and what the other server has prefilled would be lost.
        return 0 if self._is_taken_over(request) else missing

    def accept_load(self, request: Request) -> None:
        """Makes vLLM accept the load of a request that skips the prefix cache.

        vLLM reads one flag for two decisions: before it asks the connector, whether to look into its own cache, and
        after that, whether to accept what the connector loads. The flag stays off from here to the end of the step
        (`end_step`), since vLLM looks into its cache again after a preemption.
        """
        if request.skip_reading_prefix_cache:
            request.skip_reading_prefix_cache = False
            self._skips_prefix_cache.append(request)

    def allocated(self, request: Request, get_block_ids: Callable[[], BlockIds], num_external: int) -> None:
        """Records the load of a request that the scheduler has just given blocks to.

        Args:
            request: The request.
            get_block_ids: Returns its block ids per KV cache group; called only if it has a prefix.
            num_external: How many tokens the scheduler counts as loaded.
        """
        spec = self._specs.get(request.request_id)
        if spec is None:
            return
        missing = self._num_loadable.pop(request.request_id, None)
        if missing is None:
            # The second call, after an asynchronous load by another connector.
            return
        block_ids = get_block_ids()
        self.recent_blocks.add(request, block_ids)
        if self.pinned is not None and (spec.pinned or self.pinned):
            self.pinned.used(spec, request)
        p = spec.num_virtual_tokens
        self.stats.add("block_hits", spec.name, (p - missing) // self._block_size)
        if missing == 0:
            return
        if num_external == 0:
            # With --prefix-match-unit, hits may end within blocks. vLLM then asks what can be loaded after the last
            # full block, and accepts nothing if its own cache goes beyond that. Or another connector loads the prompt.
            self._loaded_by_others.append((request, spec))
            return
        if num_external != missing:
            # Going on would silently run placeholders as text.
            raise RuntimeError(
                f"vLLM takes {num_external} tokens of the prefix {spec.name!r} as loaded instead of {missing}."
            )
        self._loads.append(PrefixLoad(spec, p - missing, p, block_ids))
        self.stats.add("loads", spec.name)
        self.stats.add("loaded_tokens", spec.name, missing)

    def take_loads(self) -> list[PrefixLoad]:
        """Returns the loads of the step that was just scheduled, and forgets them."""
        for request, spec in self._loaded_by_others:
            if request.num_computed_tokens < spec.num_virtual_tokens:
                raise RuntimeError(
                    f"vLLM neither has nor loads {spec.num_virtual_tokens - request.num_computed_tokens} tokens of the "
                    f"prefix {spec.name!r}."
                )
        self._loaded_by_others.clear()
        loads, self._loads = self._loads, []
        return loads

    def end_step(self) -> None:
        """Ends the scheduling of a step."""
        for request in self._skips_prefix_cache:
            request.skip_reading_prefix_cache = True
        self._skips_prefix_cache.clear()
        self.recent_blocks.next_step()
        self.other_connectors.next_step()

    def finished(self, request: Request, block_ids: tuple[list[int], ...]) -> dict[str, Any] | None:
        """Forgets a request, whether it ran or not.

        Args:
            request: The request.
            block_ids: The blocks it had per KV cache group.

        Returns:
            What the KV transfer parameters of its response say of its prefix, if another server goes on with it.
        """
        self._num_loadable.pop(request.request_id, None)
        spec = self._specs.pop(request.request_id, None)
        if spec is None:
            return None
        self.recent_blocks.add(request, block_ids)
        return (
            handover.say(spec) if self._handovers is not None and _transfer(request).get("do_remote_decode") else None
        )

    def _is_taken_over(self, request: Request) -> bool:
        """Returns whether another connector loads the whole prompt of a request, placeholders included."""
        return (
            self._handovers is not None
            and bool(_transfer(request).get("do_remote_prefill"))
            # vLLM loads nothing for a request that skips the prefix cache, unless it has to; see `accept_load`.
            and not request.skip_reading_prefix_cache
            and all(request is not other for other in self._skips_prefix_cache)
        )

    def _prefix_hashes(self, request: Request, p: int) -> tuple[Any, ...]:
        """Returns the hashes of the blocks that a prefix fills, computed by vLLM once per prefix and salt.

        They are computed for a constant token and without media, so that all requests with the same salt share the
        blocks. A LoRA adapter separates them as well, since vLLM hashes its name into each block.
        """
        lora = request.lora_request
        key = request.cache_salt, p, lora and (lora.lora_name, lora.lora_path)
        hashes = self._hashes.get(key)
        if hashes is None:
            prefix_only: Any = copy.copy(request)
            prefix_only._all_token_ids = prefix_only.all_token_ids = [0] * p
            prefix_only.block_hashes, prefix_only.mm_features = [], []
            prefix_only.update_block_hashes()
            hashes = self._hashes[key] = tuple(prefix_only.block_hashes)
            if len(self._hashes) > MAX_HASHED_PREFIXES:
                self._hashes.popitem(last=False)
        else:
            self._hashes.move_to_end(key)
        return hashes


def _transfer(request: Request) -> dict[str, Any]:
    return request.kv_transfer_params or {}
