"""KV events of requests with a prefix, made by vLLM's own block pool, as a router reads them."""

from __future__ import annotations

from collections import Counter

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest

from helpers.serving.replica import BLOCK_SIZE, PICTURES, SPECS, UNIT, Replica
from helpers.serving.support import prompt_ids


@pytest.fixture
def replica() -> Replica:
    return Replica()


def num_matched(p: int, length: int) -> int:
    """Returns how many blocks of a prompt are there once all full blocks of the cache are."""
    return (p + length) // BLOCK_SIZE - -(-p // BLOCK_SIZE)


@pytest.mark.parametrize("p", SPECS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_router_finds_the_prompt_under_the_name_only(replica: Replica, p: int, steps: int) -> None:
    prompt = prompt_ids(170)
    replica.store(replica.request(prompt, p), steps)
    events = replica.publish()
    expected = num_matched(p, len(prompt))
    assert expected >= 4
    assert replica.router.match(f"p{p}", prompt) == expected
    assert replica.router.match(None, prompt) == replica.router.match("other", prompt) == 0
    # As a client that sends the placeholders would be found.
    assert replica.router.match(None, [prompt[0]] * p + prompt) == 0
    assert replica.router.match(f"p{p}", [prompt[0]] * BLOCK_SIZE + prompt) == 0
    published = [token for event in events for token in event.token_ids]
    assert published == prompt[: expected * BLOCK_SIZE]
    assert {event.lora_id for event in events}.isdisjoint({None, 0})
    assert replica.router.num_orphans == 0


@pytest.mark.parametrize("p", SPECS)
@pytest.mark.parametrize("salt", [None, "mine"])
def test_events_are_those_of_the_same_prompt_without_a_prefix(p: int, salt: str | None) -> None:
    """Tokens, images, and the client's salt of each block, as vLLM publishes them for the base model."""
    prompt, published = prompt_ids(170), []
    for length in (None, p):
        replica = Replica()
        replica.store(replica.request(prompt, length, mm_features=PICTURES, cache_salt=salt))
        published.append(replica.publish())
    (plain,), (event,) = published
    assert plain.lora_name is None
    assert plain.lora_id is None
    count = num_matched(p, len(prompt))
    assert len(event.block_hashes) == count
    assert event.token_ids == plain.token_ids[: count * BLOCK_SIZE]
    assert event.extra_keys == plain.extra_keys[:count]
    assert sum(keys is not None for keys in event.extra_keys) >= 3
    assert (event.parent_block_hash, event.block_size) == (None, BLOCK_SIZE)


def test_prefixes_on_lora_have_their_own_name(replica: Replica) -> None:
    prompt = prompt_ids(100)
    for lora in (None, LoRARequest("lora", 7, "/lora")):
        replica.store(replica.request(prompt, 32, lora_request=lora))
    first, second = replica.publish()
    assert first.lora_name == second.lora_name == "p32"
    assert first.extra_keys == second.extra_keys == [None] * 3
    assert set(first.block_hashes).isdisjoint(second.block_hashes)


@pytest.mark.parametrize("p", SPECS)
def test_a_block_of_several_prompts_goes_with_the_last_of_them(replica: Replica, p: int) -> None:
    common = prompt_ids(2 * BLOCK_SIZE)
    prompts = [common + prompt_ids(90, seed=seed) for seed in (1, 2, 3)]
    stored = [replica.store(replica.request(prompt, p)) for prompt in prompts]
    replica.publish()

    def matches() -> list[int]:
        return [replica.router.match(f"p{p}", prompt) for prompt in prompts]

    all_of_it = num_matched(p, len(prompts[0]))
    assert matches() == [all_of_it] * 3
    num_prompts = Counter(block.block_id for blocks in stored for block in blocks)
    own = [[block for block in blocks if num_prompts[block.block_id] == 1] for blocks in stored]
    replica.remove(own[0])
    replica.publish()
    assert matches() == [2, all_of_it, all_of_it]
    replica.store(replica.request(prompts[0], p))
    replica.remove(own[1])
    replica.publish()
    assert matches() == [all_of_it, 2, all_of_it]
    assert replica.router.num_orphans == replica.router.num_unknown == 0


@pytest.mark.parametrize("p", SPECS)
def test_nothing_is_kept_of_blocks_that_are_gone(replica: Replica, p: int) -> None:
    for is_cleared in (False, True):
        for seed in range(3):
            replica.store(replica.request(prompt_ids(100, seed=seed), p))
        replica.publish()
        kept = vars(replica.pool)["prefix_events"]
        assert len(kept) > 0
        if is_cleared:
            replica.clear()
        else:
            replica.remove(replica.blocks)
        replica.publish()
        assert len(kept) == 0
        assert replica.router.match(f"p{p}", prompt_ids(100)) == 0
    assert replica.router.num_unknown == 0


@pytest.mark.parametrize("p", SPECS)
def test_blocks_that_are_removed_and_stored_in_one_step_are_there(replica: Replica, p: int) -> None:
    prompt = prompt_ids(100)
    for _ in range(2):
        replica.remove(replica.store(replica.request(prompt, p)))
        blocks = replica.store(replica.request(prompt, p))
        replica.publish()
        assert replica.router.match(f"p{p}", prompt) == num_matched(p, 100)
        replica.remove(blocks)
        replica.publish()
        assert replica.router.match(f"p{p}", prompt) == 0
    assert replica.router.num_unknown == 0


@pytest.mark.parametrize("p", SPECS)
def test_blocks_outside_of_a_sliding_window_are_left_out(replica: Replica, p: int) -> None:
    request = replica.request(prompt_ids(170), p)
    num_blocks = request.num_tokens // BLOCK_SIZE
    for group, outside in ((0, 0), (1, num_blocks - 2)):
        blocks = [replica.pool.null_block] * outside + replica.pool.get_new_blocks(num_blocks - outside)
        replica.pool.cache_full_blocks(request, blocks, 0, num_blocks, BLOCK_SIZE, group)
    whole, window = replica.pool.take_events()
    assert window.block_hashes == whole.block_hashes[-2:]
    assert window.token_ids == whole.token_ids
    # The group is part of what is removed.
    replica.pool.evict_blocks({blocks[-1].block_id})
    (removed,) = replica.pool.take_events()
    assert (removed.block_hashes, removed.group_idx) == (whole.block_hashes[-1:], 1)


@pytest.mark.parametrize("p", SPECS)
def test_hits_that_end_within_a_block(p: int) -> None:
    """`--prefix-match-unit`: vLLM publishes a unit of tokens as a block of its own."""
    replica, prompt = Replica(UNIT), prompt_ids(100)
    request = replica.request(prompt, p)
    stop = -(-p // UNIT) * UNIT + 2 * UNIT
    (block,) = replica.pool.get_new_blocks(1)
    for position in (UNIT, stop - UNIT, stop):
        replica.pool.cache_partial_block(request, block, position, 0, BLOCK_SIZE)
    events = [event for event in replica.pool.take_events() if isinstance(event, BlockStored)]
    assert [event.token_ids for event in events] == [prompt[:UNIT], prompt[UNIT : 2 * UNIT]]
    assert {event.lora_name for event in events} == {f"p{p}"}
    assert events[0].parent_block_hash is None
    assert events[1].parent_block_hash == events[0].block_hashes[0]


@pytest.mark.parametrize("p", SPECS)
def test_the_end_of_a_prompt_follows_its_blocks(p: int) -> None:
    """A part of a block comes after whole ones, and whole ones replace it, in vLLM's own chain of hashes as in ours."""
    replica, prompt = Replica(UNIT), prompt_ids(170)
    request = replica.request(prompt, p)
    blocks = replica.store(request)
    (event,) = replica.publish()
    # The first unit behind the last block.
    end = len(event.token_ids)
    stop = -(-p // UNIT) * UNIT + end + UNIT
    (tail,) = replica.pool.get_new_blocks(1)
    replica.pool.cache_partial_block(request, tail, stop, 0, BLOCK_SIZE)
    (part,) = replica.pool.take_events()
    assert part.token_ids == prompt[end : end + UNIT]
    assert part.parent_block_hash == event.block_hashes[-1]
    # A unit that ends where a block of the prompt does stays as long as one of them does. If a block of the cache ends there
    # as well, vLLM has one hash for both, and publishes that it is removed with the first.
    is_one = -p % UNIT == -p % BLOCK_SIZE
    replica.pool.cache_partial_block(request, tail, stop - UNIT, 0, BLOCK_SIZE)
    replica.pool.evict_blocks({block.block_id for block in blocks})
    removals = [each for each in replica.pool.take_events() if isinstance(each, BlockRemoved)]
    removed = {block_hash for each in removals for block_hash in each.block_hashes}
    assert removed == set(event.block_hashes if is_one else event.block_hashes[:-1])


@pytest.mark.parametrize("p", SPECS)
def test_hits_that_are_reported_again(replica: Replica, p: int) -> None:
    """`kv_cache_report_mode`: vLLM reports the whole prompt for a group that has the end of it only."""
    request = replica.request(prompt_ids(170), p)
    num_blocks = request.num_tokens // BLOCK_SIZE
    blocks = [replica.pool.null_block] * (num_blocks - 2) + replica.pool.get_new_blocks(2)
    replica.pool.cache_full_blocks(request, blocks, 0, num_blocks, BLOCK_SIZE, 1)
    for _ in range(2):
        replica.pool.emit_cached_block_events(request, num_blocks, BLOCK_SIZE, 1)
    _, *reported = replica.pool.take_events()
    count = num_matched(p, 170)
    assert [event.token_ids for event in reported] == [prompt_ids(170)[: count * BLOCK_SIZE]] * 2
    assert [len(event.block_hashes) for event in reported] == [count] * 2
    # What was never there is never removed, and must not stay with us.
    replica.pool.evict_blocks({block.block_id for block in blocks[-2:]})
    removed = replica.pool.take_events()
    assert [event.block_hashes[0] for event in removed] == reported[0].block_hashes[-2:]
    assert len(vars(replica.pool)["prefix_events"]) == 0


def test_events_that_are_dropped_are_forgotten(replica: Replica) -> None:
    """A later event may have their place in memory."""
    replica.store(replica.request(prompt_ids(100), 70))
    kept = vars(replica.pool)["prefix_events"]
    assert len(kept) > 0
    replica.pool.kv_event_queue.clear()
    for seed in range(20):
        replica.store(replica.request(prompt_ids(100, seed=seed)))
        assert all(len(event.block_hashes) == 3 for event in replica.publish())
    assert len(kept) == 0


def test_tokens_behind_a_block_are_part_of_its_hash(replica: Replica) -> None:
    """vLLM 0.33 hashes them where a draft model reads ahead, and publishes them."""
    replica.pool.num_hash_lookahead_tokens = 1
    prompt = prompt_ids(2 * BLOCK_SIZE)
    # They differ in the token behind the first block of the prompt.
    for token in (5, 6):
        replica.store(replica.request([*prompt[:BLOCK_SIZE], token, *prompt[BLOCK_SIZE + 1 :]], 31))
    first, second = replica.pool.take_events()
    assert first.token_ids[:BLOCK_SIZE] == second.token_ids[:BLOCK_SIZE]
    assert first.block_hashes[0] != second.block_hashes[0]


def test_equal_adapters_are_published_alike_by_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    # As operators set it, since vLLM's own hashes start from it.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    hashes = []
    for _ in range(2):
        replica = Replica()
        for p in SPECS:
            replica.store(replica.request(prompt_ids(100), p))
        hashes.append([event.block_hashes for event in replica.publish()])
    assert hashes[0] == hashes[1]


def test_without_events_nothing_is_kept(replica: Replica) -> None:
    replica.pool.enable_kv_cache_events = False
    request = replica.request(prompt_ids(100), 70)
    replica.remove(replica.store(request))
    assert replica.publish() == []
    assert "prefix_events" not in vars(replica.pool)
    assert "prefix_event_digests" not in vars(request)
