"""The scheduler's bookkeeping, on vLLM's own requests and block hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from helpers.serving.support import prompt_ids
from vllm_plugin.adapters.spec import PrefixSpec, pack
from vllm_plugin.patches.install import require
from vllm_plugin.scheduler.scheduler import PrefixScheduler

BLOCK_SIZE = 32
SPECS = {p: PrefixSpec(f"p{p}", "", f"/p{p}", p, f"{p:064}") for p in (1, 32, 70, 130)}


@pytest.fixture(autouse=True)
def _seeded_hashes() -> None:
    kv_cache_utils.init_none_hash(sha256)


@pytest.fixture
def make() -> Iterator[Callable[..., Request]]:
    """Makes requests, whose `hashed` holds all block hashes that were computed for them."""
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
    numbers = iter(range(1000))

    def make(prompt: list[int], spec: PrefixSpec | None = None, **fields: Any) -> Request:
        def counting(request: Request) -> list[Any]:
            hashes = hasher(request)
            # One list for the request and its copies.
            vars(request).setdefault("hashed", []).extend(hashes)
            return hashes

        transfer = None if spec is None else {"kv_transfer_params": {"prefix_adapters": pack(spec)}}
        params = SamplingParams(max_tokens=5, extra_args=transfer)
        return Request(
            f"request-{next(numbers)}",
            list(prompt),
            params,
            None,
            **{"cache_salt": None, "block_hasher": counting, **fields},
        )

    return make


def lora(name: str) -> LoRARequest:
    return LoRARequest(name, 1, "/lora")


def pictures(*identifiers: str) -> list[MultiModalFeatureSpec]:
    """One of 20 tokens every 30 tokens."""
    return [
        MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=5 + 30 * number, length=20))
        for number, identifier in enumerate(identifiers)
    ]


@pytest.mark.parametrize("p", SPECS)
@pytest.mark.parametrize("pictures_first", [True, False])
def test_pictures_stand_behind_the_prefix_and_in_the_hashes_of_their_own_blocks(
    make: Any, p: int, pictures_first: bool
) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    prompt = prompt_ids(100)
    requests = {
        names: make(prompt, SPECS[p], mm_features=pictures(*names))
        for names in (((), ("a", "b"), ("b", "a"), ("a", "c"))[:: -1 if pictures_first else 1])
    }
    for names, request in requests.items():
        scheduler.add_placeholders(request)
        assert [feature.mm_position.offset for feature in request.mm_features] == [
            p + 5 + 30 * number for number, _ in enumerate(names)
        ]
    full = p // BLOCK_SIZE
    assert len({tuple(request.block_hashes[:full]) for request in requests.values()}) == 1
    assert len({request.block_hashes[-1] for request in requests.values()}) == len(requests)
    # Up to the last block before the second picture.
    shared = (p + 35) // BLOCK_SIZE
    assert requests["a", "b"].block_hashes[:shared] == requests["a", "c"].block_hashes[:shared]


@pytest.mark.parametrize("p", SPECS)
def test_hashes_equal_those_of_vllm(make: Any, p: int) -> None:
    """They equal vLLM's hashes of p placeholders under the prefix's salt, and are computed once for all requests."""
    scheduler = PrefixScheduler(BLOCK_SIZE)
    full = p // BLOCK_SIZE
    for seed, salt, adapter in ((1, None, None), (2, None, None), (3, "mine", None), (4, None, lora("x"))):
        prompt = prompt_ids(80, seed=seed)
        request = make(prompt, SPECS[p], cache_salt=salt, lora_request=adapter)
        before = len(request.hashed)
        scheduler.add_placeholders(request)
        plain = make([0] * p, cache_salt=SPECS[p].salt(salt), lora_request=adapter)
        assert request.block_hashes[:full] == plain.block_hashes
        assert len(request.block_hashes) == (p + 80) // BLOCK_SIZE
        assert list(request.all_token_ids) == [prompt[0]] * p + prompt
        others = (p + 80) // BLOCK_SIZE - full
        assert len(request.hashed) - before == others + (0 if seed == 2 else full)


@pytest.mark.parametrize("spec", [None, SPECS[70]], ids=["base", "prefix"])
def test_no_block_is_hashed_twice(spec: PrefixSpec | None) -> None:
    """vLLM hashes new requests, but not before the placeholders precede the prompt."""
    require(server=False)
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
    hashed: list[Any] = []

    def counting(request: Request) -> list[Any]:
        hashed.extend(hashes := hasher(request))
        return hashes

    transfer = None if spec is None else {"kv_transfer_params": {"prefix_adapters": pack(spec)}}
    params = SamplingParams(max_tokens=5, extra_args=transfer)
    message = EngineCoreRequest("request", prompt_ids(80), None, params, None, 0.0, None, None, None)
    request = Request.from_engine_core_request(message, counting)
    PrefixScheduler(BLOCK_SIZE).add_placeholders(request)
    assert hashed == request.block_hashes
    assert len(hashed) == (80 + (spec.num_virtual_tokens if spec else 0)) // BLOCK_SIZE
    # Blocks of its output are hashed as usual.
    request.append_output_token_ids([5] * BLOCK_SIZE)
    assert hashed == request.block_hashes
    # The front end's prompt is unchanged.
    assert message.prompt_token_ids == prompt_ids(80)


def test_salts_loras_and_adapters_share_no_block(make: Any) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    prompt, seen = prompt_ids(80), set()
    other = dataclasses.replace(SPECS[70], digest="f" * 64)
    kinds = [
        (spec, salt, adapter) for spec in (SPECS[70], other) for salt in (None, "a") for adapter in (None, "x", "y")
    ]
    for spec, salt, adapter in kinds:
        request = make(prompt, spec, cache_salt=salt, lora_request=adapter and lora(adapter))
        scheduler.add_placeholders(request)
        assert not seen & set(request.block_hashes)
        seen |= set(request.block_hashes)


def test_a_request_loads_uncached_tokens(make: Any) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    expected = {0: (0, 70), 32: (32, 70), 64: (64, 70), 96: None}
    for computed, part in expected.items():
        request = make(prompt_ids(50), SPECS[70])
        scheduler.add_placeholders(request)
        missing = scheduler.num_loadable(request, computed)
        assert missing == max(0, 70 - computed)
        # vLLM asks again if there was no room for the request.
        assert scheduler.num_loadable(request, computed) == missing
        scheduler.allocated(request, lambda: ([1, 2, 3, 4],), missing)
        assert [(load.spec, (load.start, load.stop)) for load in scheduler.take_loads()] == (
            [] if part is None else [(SPECS[70], part)]
        )
        # The second call follows a load by another connector.
        scheduler.allocated(request, lambda: ([1, 2, 3, 4],), 0)
    taken = scheduler.stats.take()
    assert taken is not None
    assert taken.data == {
        "requests": {"p70": 4},
        "loads": {"p70": 3},
        "loaded_tokens": {"p70": 70 + 38 + 6},
        "block_hits": {"p70": 0 + 1 + 2 + 2},
    }
    assert scheduler.stats.take() is None


def test_a_load_that_vllm_cuts_short_is_an_error(make: Any) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    request = make(prompt_ids(50), SPECS[70])
    scheduler.add_placeholders(request)
    scheduler.num_loadable(request, 0)
    with pytest.raises(RuntimeError, match="takes 64 tokens of the prefix 'p70' as loaded instead of 70"):
        scheduler.allocated(request, lambda: ([1, 2, 3, 4],), 64)


def test_a_skipped_load_must_be_cached(make: Any) -> None:
    """vLLM's cache may go beyond the last full block, up to which it asks the connector."""
    scheduler = PrefixScheduler(BLOCK_SIZE)
    for computed in (80, 70, 69):
        request = make(prompt_ids(50), SPECS[70])
        scheduler.add_placeholders(request)
        assert scheduler.num_loadable(request, 64) == 6
        scheduler.allocated(request, lambda: ([1, 2, 3, 4],), 0)
        request.num_computed_tokens = computed
        if computed < 70:
            with pytest.raises(RuntimeError, match="vLLM neither has nor loads 1 tokens of the prefix 'p70'"):
                scheduler.take_loads()
        else:
            assert scheduler.take_loads() == []


def test_finished_requests_are_forgotten(make: Any) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    for step in range(3):
        request = make(prompt_ids(50), SPECS[70])
        scheduler.add_placeholders(request)
        if step > 0:
            scheduler.num_loadable(request, 0)
        if step > 1:
            scheduler.allocated(request, lambda: ([1, 2, 3, 4],), 70)
        scheduler.finished(request, ())
    scheduler.take_loads()
    assert not scheduler._specs
    assert not scheduler._num_loadable


def test_requests_to_the_base_model_are_left_alone(make: Any) -> None:
    scheduler = PrefixScheduler(BLOCK_SIZE)
    prompt = prompt_ids(70)
    # The front end refused the last one, and vLLM passes it on with the client's parameters.
    for request in (make(prompt), make(prompt, abort_immediately=True)):
        if request.abort_immediately:
            request.kv_transfer_params = {"prefix_adapters": ["x"]}
        before = list(request.block_hashes)
        scheduler.add_placeholders(request)
        assert list(request.all_token_ids) == prompt
        assert request.block_hashes == before
        assert scheduler.num_loadable(request, 0) == 0
        scheduler.allocated(request, lambda: ([1, 2, 3],), 0)
        scheduler.finished(request, ())
    assert scheduler.take_loads() == []
    assert scheduler.stats.take() is None
