"""Prefixes beside vLLM's NixlConnector: the counts of both servers, on vLLM's own schedulers and connectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import FinishReason

from helpers.serving.disaggregated import Server, engine_config
from helpers.serving.support import BLOCK_SIZE, prompt_ids
from vllm_plugin.adapters import handover
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.scheduler import handovers
from vllm_plugin.scheduler.handovers import NEEDED

LENGTHS = (4, 32, 70)
SPECS = {p: PrefixSpec(f"p{p}", "", f"/p{p}", p, f"{p:064}") for p in LENGTHS}
WINDOW = 64


class Servers(NamedTuple):
    prefills: Server
    decodes: Server


@pytest.fixture(scope="module")
def configs(model: Path) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # vLLM sets it for the NixlConnector on CPUs, and it would stay for later tests.
        patch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
        return [engine_config(model, role) for role in ("kv_producer", "kv_consumer")]


@pytest.fixture(params=[None, WINDOW], ids=["one group", "sliding window"])
def servers(request: pytest.FixtureRequest, configs: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    kv_cache_utils.init_none_hash(sha256)
    # An engine of another test may run in this process.
    monkeypatch.setattr("vllm_plugin.connector.has_kv_transfer_group", lambda: False)
    found = Servers(*(Server(config, request.param) for config in configs))
    yield found
    for server in found:
        server.scheduler.shutdown()


def blocks_of(num_tokens: int) -> int:
    return math.ceil(num_tokens / BLOCK_SIZE)


def decode(server: Server, request_id: str, num_tokens: int = 1) -> list[Any]:
    """Runs a request alone to its end. Returns its outputs."""
    outputs = []
    for _ in range(num_tokens):
        step, _, _ = server.schedule()
        outputs.append(server.finish(step, sampled=[request_id])[request_id])
    return outputs


@pytest.mark.parametrize("p", LENGTHS)
def test_both_servers_count_the_placeholders(servers: Servers, p: int) -> None:
    spec, free = SPECS[p], [server.num_free_blocks for server in servers]
    for number in range(3):
        prompt = prompt_ids(50 + number, seed=number)
        total = p + len(prompt)
        transfer, loads = servers.prefills.prefill(prompt, spec)
        cached = 0 if number == 0 else p // BLOCK_SIZE * BLOCK_SIZE
        assert [(load.start, load.stop) for load in loads] == ([(cached, p)] if cached < p else [])
        assert transfer["remote_num_tokens"] == total
        assert len(transfer["remote_block_ids"][0]) == blocks_of(total)
        assert handover.problem(spec, transfer) is None
        assert "prefix_adapters" not in transfer

        request_id = servers.decodes.add(prompt, spec, transfer, max_tokens=3)
        step, loads, nixl = servers.decodes.schedule()
        # Its blocks come from the other server, prefix included, except for those that it has already.
        assert (loads, step.num_scheduled_tokens) == ([], {})
        read = nixl.reqs_to_recv[request_id]
        assert read.awaiting_kvs
        cached_here = read.local_num_computed_blocks[0]
        assert len(read.local_block_ids[0]) == blocks_of(total) - cached_here
        for local, remote in zip(read.local_block_ids, read.remote.block_ids, strict=True):
            assert len(local) <= len(remote)
        # Of a prefix that is longer than the window, the transfer leaves out the beginning.
        if servers.decodes.num_groups == 1 or p < WINDOW:
            assert cached_here == cached // BLOCK_SIZE
        assert (read.remote.num_tokens, read.remote.block_ids) == (total, transfer["remote_block_ids"])
        servers.decodes.finish(step, finished_recving={request_id})
        servers.prefills.was_read(transfer)

        step, loads, nixl = servers.decodes.schedule()
        # The last token runs here, which gives the first new one.
        assert (step.num_scheduled_tokens, loads, nixl.reqs_to_recv) == ({request_id: 1}, [], {})
        assert step.scheduled_new_reqs[0].num_computed_tokens == total - 1
        first = servers.decodes.finish(step, sampled=[request_id])[request_id]
        assert first.prefill_stats.num_prompt_tokens == len(prompt)
        assert decode(servers.decodes, request_id, 2)[-1].finish_reason == FinishReason.LENGTH
        assert [server.num_free_blocks for server in servers] == free


def test_prefixes_and_the_base_model_at_once(servers: Servers) -> None:
    """Blocks that one of them has cached are nothing to the others."""
    prompt = prompt_ids(50)
    specs = [None, *SPECS.values()]
    answers = [servers.prefills.prefill(prompt, spec)[0] for spec in specs]
    assert [handover.problem(spec, answer) for spec, answer in zip(specs, answers, strict=True)] == [None] * 4
    assert handover.CONTENT not in answers[0]
    ids = [servers.decodes.add(prompt, spec, answer) for spec, answer in zip(specs, answers, strict=True)]
    step, loads, nixl = servers.decodes.schedule()
    assert loads == []
    assert {request_id: len(read.local_block_ids[0]) for request_id, read in nixl.reqs_to_recv.items()} == {
        request_id: blocks_of(50 + p) for request_id, p in zip(ids, (0, *LENGTHS), strict=True)
    }
    servers.decodes.finish(step, finished_recving=set(ids))
    step, loads, _ = servers.decodes.schedule()
    assert (step.num_scheduled_tokens, loads) == (dict.fromkeys(ids, 1), [])


@pytest.mark.parametrize("p", LENGTHS)
def test_a_request_that_is_not_handed_over_loads_its_prefix(servers: Servers, p: int) -> None:
    for server in servers:
        request_id = server.add(prompt_ids(50), SPECS[p])
        step, loads, nixl = server.schedule()
        assert ([(load.start, load.stop) for load in loads], nixl.reqs_to_recv) == ([(0, p)], {})
        assert step.num_scheduled_tokens == {request_id: 50}
        # Nobody goes on with it, so the response says nothing.
        assert server.finish(step, sampled=[request_id])[request_id].kv_transfer_params is None


@pytest.mark.parametrize("p", LENGTHS)
def test_prompt_log_probabilities_run_the_text_here(servers: Servers, p: int) -> None:
    """vLLM then takes over nothing, so the prefix is loaded, and the other server may free its blocks."""
    prompt = prompt_ids(50)
    for _ in range(2):
        transfer, _ = servers.prefills.prefill(prompt, SPECS[p])
        request_id = servers.decodes.add(prompt, SPECS[p], transfer, prompt_logprobs=1)
        step, loads, nixl = servers.decodes.schedule()
        assert [(load.start, load.stop) for load in loads] == [(0, p)]
        assert step.num_scheduled_tokens == {request_id: 50}
        read = nixl.reqs_to_recv[request_id]
        assert (list(read.local_block_ids), read.awaiting_kvs) == ([], False)
        servers.decodes.finish(step, sampled=[request_id])


def test_a_preempted_request_loads_its_prefix(servers: Servers) -> None:
    """The blocks of the other server are gone by then."""
    prompt, spec = prompt_ids(50), SPECS[70]
    transfer, _ = servers.prefills.prefill(prompt, spec)
    request_id = servers.decodes.add(prompt, spec, transfer, max_tokens=5)
    step, _, _ = servers.decodes.schedule()
    servers.decodes.finish(step, finished_recving={request_id})
    decode(servers.decodes, request_id)
    assert servers.decodes.scheduler.reset_prefix_cache(reset_running_requests=True)
    step, loads, nixl = servers.decodes.schedule()
    assert ([(load.start, load.stop) for load in loads], nixl.reqs_to_recv) == ([(0, 70)], {})
    assert step.num_scheduled_tokens == {request_id: 51}


def test_a_request_that_never_ran_frees_the_blocks_of_the_other_server(servers: Servers) -> None:
    from vllm.v1.request import RequestStatus

    transfer, _ = servers.prefills.prefill(prompt_ids(50), SPECS[32])
    request_id = servers.decodes.add(prompt_ids(50), SPECS[32], transfer)
    servers.decodes.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)
    _, loads, nixl = servers.decodes.schedule()
    assert (loads, list(nixl.reqs_to_recv)) == ([], [request_id])
    assert list(nixl.reqs_to_recv[request_id].local_block_ids) == []


@pytest.mark.parametrize("spec", [None, SPECS[32]], ids=["base", "prefix"])
@pytest.mark.parametrize("missing", [*NEEDED, "all"])
def test_a_request_that_names_no_blocks_runs_here(servers: Servers, spec: PrefixSpec | None, missing: str) -> None:
    """vLLM's connector would end the engine, or wait for ever."""
    from vllm.v1.request import RequestStatus

    prompt = prompt_ids(50)
    transfer, _ = servers.prefills.prefill(prompt, spec)
    lacks = {} if missing == "all" else {name: value for name, value in transfer.items() if name != missing}
    lacks["do_remote_prefill"] = True
    request_id = servers.decodes.add(prompt, spec, dict(lacks))
    step, loads, nixl = servers.decodes.schedule()
    assert (step.num_scheduled_tokens, nixl.reqs_to_recv) == ({request_id: 50}, {})
    assert [(load.start, load.stop) for load in loads] == ([] if spec is None else [(0, 32)])
    servers.decodes.finish(step, sampled=[request_id])
    # The front end passes on the parameters of a request that it refuses.
    refused = servers.decodes.add(prompt, None, dict(lacks))
    servers.decodes.scheduler.finish_requests([refused], RequestStatus.FINISHED_ABORTED)
    _, _, nixl = servers.decodes.schedule()
    assert nixl.reqs_to_recv == {}


@pytest.mark.parametrize("spec", [None, SPECS[32]], ids=["base", "prefix"])
def test_blocks_are_taken_over_once(servers: Servers, spec: PrefixSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other server frees them when they were read: with `n`, and with a router that tries again, they hold anything."""
    from vllm.v1.request import RequestStatus

    prompt = prompt_ids(50)
    transfer, _ = servers.prefills.prefill(prompt, spec)
    # The choices of a request share their parameters, in an engine of the front end's process.
    first, second = (servers.decodes.add(prompt, spec, transfer) for _ in range(2))
    step, loads, nixl = servers.decodes.schedule()
    assert nixl.reqs_to_recv.keys() == {first}
    assert step.num_scheduled_tokens == {second: 50}
    assert [(load.start, load.stop) for load in loads] == ([] if spec is None else [(0, 32)])
    servers.decodes.finish(step, sampled=[second], finished_recving={first})
    decode(servers.decodes, first)
    # Nor does one that is refused free them, which the first one may be reading.
    refused = servers.decodes.add(prompt, None, transfer)
    servers.decodes.scheduler.finish_requests([refused], RequestStatus.FINISHED_ABORTED)
    other, _ = servers.prefills.prefill(prompt, spec)
    takes_over = servers.decodes.add(prompt, spec, other)
    _, _, nixl = servers.decodes.schedule()
    assert nixl.reqs_to_recv.keys() == {takes_over}
    # Not for ever.
    monkeypatch.setattr(handovers, "MAX_TAKEN_OVER", 2)
    taken_over = servers.decodes.scheduler.connector.sub_connectors[0].scheduler._handovers
    for _ in range(3):
        servers.decodes.add(prompt, spec, servers.prefills.prefill(prompt, spec)[0])
    assert len(taken_over._taken_over) <= 3


@pytest.mark.parametrize("spec", [None, SPECS[32]], ids=["base", "prefix"])
def test_blocks_of_a_shorter_prompt_are_not_taken_over(servers: Servers, spec: PrefixSpec | None) -> None:
    """Of several prompts in one request, the response has the parameters of the first only."""
    first, second = prompt_ids(50), prompt_ids(51, seed=1)
    transfer, _ = servers.prefills.prefill(first, spec)
    ids = [servers.decodes.add(prompt, spec, dict(transfer)) for prompt in (second, first)]
    step, _, nixl = servers.decodes.schedule()
    assert (step.num_scheduled_tokens, nixl.reqs_to_recv.keys()) == ({ids[0]: 51}, {ids[1]})


def test_a_prompt_is_prefilled_again_with_what_the_first_time_answered(servers: Servers) -> None:
    """vLLM's connector would wait for blocks that it does not read."""
    prompt, spec = prompt_ids(150), SPECS[32]
    for number, each in enumerate((None, spec, spec)):
        transfer, _ = servers.prefills.prefill(prompt_ids(150, seed=number), each)
        again = {**transfer, "do_remote_prefill": False, "do_remote_decode": True}
        request_id = servers.prefills.add(prompt, each, again)
        step, _, nixl = servers.prefills.schedule()
        assert (step.num_scheduled_tokens.keys(), nixl.reqs_to_recv) == ({request_id}, {})
        answer = servers.prefills.finish(step, sampled=[request_id])[request_id].kv_transfer_params
        assert answer["remote_request_id"] == request_id
        assert handover.problem(each, answer) is None


def test_a_failed_load_fails_a_request_that_waits_for_its_text(servers: Servers) -> None:
    """It has found the blocks of the prefix in the cache, where the first request was to write them."""
    spec, prompt = SPECS[70], prompt_ids(50)
    transfer, _ = servers.prefills.prefill(prompt, spec)
    writes = servers.decodes.add(prompt_ids(40, seed=1), spec, max_tokens=5)
    waits = servers.decodes.add(prompt, spec, transfer, max_tokens=5)
    base = servers.decodes.add(prompt_ids(40, seed=2), None, max_tokens=5)
    step, loads, nixl = servers.decodes.schedule()
    assert step.num_scheduled_tokens.keys() == {writes, base}
    assert nixl.reqs_to_recv[waits].local_num_computed_blocks[0] == 2
    (load,) = loads
    unwritten = {block for group in load.block_ids for block in group if block}
    outputs = servers.decodes.finish(step, sampled=[base], invalid_block_ids=unwritten)
    assert {request_id: output.finish_reason for request_id, output in outputs.items()} == {
        writes: FinishReason.ERROR,
        waits: FinishReason.ERROR,
        base: None,
    }
    # The transfer still runs, and its blocks are free afterwards.
    step, _, _ = servers.decodes.schedule()
    assert waits in servers.decodes.scheduler.requests
    servers.decodes.finish(step, sampled=[base], finished_recving={waits})
    assert waits not in servers.decodes.scheduler.requests
    # Nothing of it is found in the cache.
    again = servers.decodes.add(prompt_ids(40, seed=1), spec)
    step, loads, _ = servers.decodes.schedule()
    assert again in step.num_scheduled_tokens
    assert [(load.start, load.stop) for load in loads] == [(0, 70)]


def test_several_pipeline_stages_may_hand_over(servers: Servers) -> None:
    """vLLM tells all connectors of a server what the workers of the NixlConnector say, and the base class refuses it."""
    ours = servers.prefills.scheduler.connector.sub_connectors[0]
    stages = {(0, 0): object(), (1, 0): object()}
    with pytest.raises(ValueError, match="does not support PP-disaggregated KV transfer"):
        KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware(ours, stages)
    ours.set_xfer_handshake_metadata_pp_aware(stages)
