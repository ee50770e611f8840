"""The scheduler's side of a prefix: which tokens stand for it, and what has to be loaded where. No tensors.

Inside the engine a request's prompt starts with p placeholders. vLLM's own prefix cache finds the blocks they fill, or
this class says that they can be loaded; either way the model never runs them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_plugin.adapters.spec import ADAPTERS, PrefixSpec, unpack
from vllm_plugin.metrics import PrefixStats
from vllm_plugin.scheduler.load_failures import BlockIds, RecentBlocks
from vllm_plugin.scheduler.other_connectors import OtherConnectors
from vllm_plugin.scheduler.prefill_stats import RealPrefillStats

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """One copy of virtual tokens `start..stop-1` of a prefix into a request's blocks.

    Args:
        spec: The prefix.
        start: First virtual token to copy; those before it are cached already.
        stop: One past the last, p.
        block_ids: The request's block ids per KV cache group, from position 0; 0 is vLLM's null block.
    """

    spec: PrefixSpec
    start: int
    stop: int
    block_ids: tuple[list[int], ...]


# Prefixes, times the salts that clients use them with, whose block hashes are kept: some kilobytes each at most.
NUM_HASHED = 4096


class PrefixScheduler:
    """Bookkeeping of one engine, which knows an adapter by what its requests bring along only.

    Args:
        block_size: Tokens per block, the least common multiple if groups of layers differ.
    """

    def __init__(self, block_size: int) -> None:
        self.stats = PrefixStats()
        self.recent_blocks = RecentBlocks()
        self.other_connectors = OtherConnectors()
        self._block_size = block_size
        # The least recently used first.
        self._hashes: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()
        self._specs: dict[str, PrefixSpec] = {}
        self._num_loadable: dict[str, int] = {}
        self._loads: list[PrefixLoad] = []
        # Of this step, those that are said to need no load after all.
        self._found: list[tuple[Request, PrefixSpec]] = []
        self._skips_prefix_cache: list[Request] = []

    def add_placeholders(self, request: Request) -> None:
        """Puts the placeholders in front of a new request's prompt and salts its block hashes."""
        # To release what a connector may hold for a request that the front end refused, vLLM sends it here, aborted and
        # with the client's own parameters. It never runs.
        packed = (request.kv_transfer_params or {}).get(ADAPTERS)
        if packed is None or getattr(request, "abort_immediately", False):
            return
        spec = self._specs[request.request_id] = unpack(packed)
        p = spec.num_virtual_tokens
        request.cache_salt = spec.salt(request.cache_salt)
        request.prefill_stats = RealPrefillStats(p)
        if getattr(request.sampling_params, "prompt_logprobs", None) is not None:
            # Each real token has to run, whatever the client says.
            request.skip_reading_prefix_cache = True
        request.block_hashes[:] = self._prefix_hashes(request, p)
        # What samplers see is the request's own first token: the repetition penalty is about the set of prompt tokens,
        # which stays as it was, and every kernel that reads prompt ids gets a valid one.
        prompt = request.prompt_token_ids
        assert prompt is not None
        placeholders = [prompt[0]] * p
        request._all_token_ids[:0] = placeholders
        # A new list: an engine in its front end's process has the prompt in common with it.
        request.prompt_token_ids = placeholders + prompt
        request.num_prompt_tokens += p
        request.update_block_hashes()
        self.stats.add("requests", spec.name)

    def num_loadable(self, request: Request, num_computed: int) -> int:
        """Returns how many tokens past the `num_computed` cached ones can be loaded."""
        spec = self._specs.get(request.request_id)
        if spec is None:
            return 0
        if request.skip_reading_prefix_cache:
            # vLLM has not looked into its cache for this request, and would not take what we load either. For the rest
            # of this step it may: after a preemption vLLM looks, or does not, again.
            request.skip_reading_prefix_cache = False
            self._skips_prefix_cache.append(request)
        missing = max(0, spec.num_virtual_tokens - num_computed)
        self._num_loadable[request.request_id] = missing
        return missing

    def allocated(self, request: Request, get_block_ids: Callable[[], BlockIds], num_external: int) -> None:
        """Records the load of a request that the scheduler just gave blocks to.

        Args:
            get_block_ids: Returns its block ids per KV cache group; asked only if it has a prefix.
            num_external: How many tokens the scheduler takes as loaded.
        """
        spec = self._specs.get(request.request_id)
        if spec is None:
            return
        promised = self._num_loadable.pop(request.request_id, None)
        if promised is None:
            # An asynchronous load by another connector makes this the second call.
            return
        block_ids = get_block_ids()
        self.recent_blocks.add(request, block_ids)
        p = spec.num_virtual_tokens
        self.stats.add("block_hits", spec.name, (p - promised) // self._block_size)
        if promised == 0:
            return
        if num_external == 0:
            # Where hits may end within blocks (--prefix-match-unit), vLLM asks for what is missing behind the last whole one,
            # and takes nothing if its own cache goes on to there.
            self._found.append((request, spec))
            return
        if num_external != promised:
            # Going on would run placeholders as text, and say so to nobody.
            raise RuntimeError(
                f"vLLM takes {num_external} tokens of the prefix {spec.name!r} as loaded instead of {promised}."
            )
        self._loads.append(PrefixLoad(spec, p - promised, p, block_ids))
        self.stats.add("loads", spec.name)
        self.stats.add("loaded_tokens", spec.name, promised)

    def take_loads(self) -> list[PrefixLoad]:
        """Returns the loads of the step that was just scheduled, and forgets them."""
        for request, spec in self._found:
            if request.num_computed_tokens < spec.num_virtual_tokens:
                raise RuntimeError(
                    f"vLLM neither has nor loads {spec.num_virtual_tokens - request.num_computed_tokens} tokens of the "
                    f"prefix {spec.name!r}."
                )
        self._found.clear()
        for request in self._skips_prefix_cache:
            request.skip_reading_prefix_cache = True
        self._skips_prefix_cache.clear()
        self.recent_blocks.next_step()
        self.other_connectors.next_step()
        loads, self._loads = self._loads, []
        return loads

    def finished(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        """Forgets a request, whether it ran or not.

        Args:
            block_ids: What it had, per KV cache group.
        """
        if self._specs.pop(request.request_id, None) is not None:
            self.recent_blocks.add(request, block_ids)
        self._num_loadable.pop(request.request_id, None)

    def _prefix_hashes(self, request: Request, p: int) -> tuple[Any, ...]:
        """Returns the hashes of the blocks that a prefix fills, computed by vLLM once.

        They are hashed over a constant, so that all requests with the same salt (and LoRA, whose name vLLM hashes into
        each block) share the blocks.
        """
        lora = request.lora_request
        key = request.cache_salt, p, lora and (lora.lora_name, lora.lora_path)
        hashes = self._hashes.get(key)
        if hashes is None:
            tokens = request._all_token_ids
            request.block_hashes.clear()
            prompt, tokens[:] = list(tokens), [0] * p
            request.update_block_hashes()
            tokens[:] = prompt
            hashes = self._hashes[key] = tuple(request.block_hashes)
            if len(self._hashes) > NUM_HASHED:
                self._hashes.popitem(last=False)
        else:
            self._hashes.move_to_end(key)
        return hashes
