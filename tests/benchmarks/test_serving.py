"""Requests, ratios and the report of the serving benchmark; with engines, it runs in `make soak`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common.docs_pages import markers
from benchmarks.common.interleaving import Measurement, interleave, ratio
from benchmarks.common.random_adapters import write_loras, write_prefixes
from benchmarks.common.results import ResultsFile
from benchmarks.common.shapes import write_shape
from benchmarks.common.workload import PromptRequest, Workload
from benchmarks.serving.benchmark import Benchmark
from benchmarks.serving.comparisons import TRANSPORTS, Settings, comparisons, ratios
from benchmarks.serving.offline_engine import Engine, transformers_engine
from benchmarks.serving.report import absolute_table, ratio_table, write_report
from peft_prefix_ext.checkpoint.reader import read_prefix

SETTINGS = Settings("tiny", lengths=(16, 50), mixes=(1, 8), loras=(1, 8), ranks=(8, 16), rounds=3)


def test_ratios_are_of_candidates_that_were_measured() -> None:
    for transport in TRANSPORTS:
        found = list(comparisons(SETTINGS, transport))
        assert len({comparison.name for comparison in found}) == len(found)
        for comparison in found:
            names = {candidate.name for candidate in comparison.candidates}
            wanted = ratios(SETTINGS.record(), comparison.name)
            assert wanted
            assert {name for one in wanted for name in (one.ours, one.theirs)} <= names


def test_only_the_named_comparisons_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Benchmark, "_write_adapters", lambda self, folder: ({}, {}))
    monkeypatch.setattr(Benchmark, "_measure", lambda self, comparison, transport, start: {})
    settings = replace(SETTINGS, model=str(write_shape(tmp_path / "0.5B", "0.5B")))
    results = ResultsFile(tmp_path / "results.json", settings.record())
    Benchmark(settings, results, tmp_path, ["mixes", "LoRA, 8"]).run(TRANSPORTS)
    made = [(record["transport"], record["comparison"]) for record in results.records]
    assert made == [("offline", "mixes"), ("offline", "LoRA, 8"), ("http", "mixes")]


def test_requests_have_their_length_and_are_new_each_time() -> None:
    workload = Workload(num_requests=10, input_tokens=5, output_tokens=3, vocab_size=100)
    names = ("a", "b", "c", "d")
    requests = workload.requests("round 1", names, prefix=[7, 7])
    assert [len(request.prompt) for request in requests] == [7] * 10
    assert all(request.prompt[:2] == [7, 7] for request in requests)
    assert {request.adapter for request in requests[:4]} == set(names)
    assert sorted(requests.count(request) for request in requests) == [1] * 10
    assert requests == workload.requests("round 1", names, prefix=[7, 7])
    assert requests != workload.requests("round 2", names, prefix=[7, 7])


def test_ratios_are_within_rounds() -> None:
    """The load of the machine in a round cancels out."""
    loads, calls = [random.Random(0).uniform(1, 100) for _ in range(6)], []

    def action(name: str, seconds: float) -> Callable[[], Measurement]:
        rounds = iter(loads)

        def measure() -> Measurement:
            calls.append(name)
            return {"seconds": seconds * next(rounds)}

        return measure

    results = interleave({"slow": action("slow", 2.0), "fast": action("fast", 1.0)}, rounds=5)
    assert [len(rounds) for rounds in results.values()] == [5, 5]
    assert all({first, second} == {"slow", "fast"} for first, second in zip(calls[::2], calls[1::2], strict=True))
    assert len(set(calls[::2])) == 2, "the order changes"
    assert ratio(results["slow"], results["fast"], "seconds") == {"median": 2.0, "quartiles": [2.0, 2.0], "rounds": 5}


def test_adapters_are_real_and_differ(tmp_path: Path) -> None:
    from helpers.tiny import tiny_model

    base = tiny_model("llama")
    prefixes = write_prefixes(tmp_path, base, 5, 3)
    read = [read_prefix(path) for path in prefixes.values()]
    assert [one.num_virtual_tokens for one in read] == [5] * 3
    assert len({one.digest for one in read}) == 3
    loras = write_loras(tmp_path, base, 2, 2)
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in loras.values()]
    assert len(set(weights)) == 2
    assert not hasattr(base, "peft_config")


def test_transformers_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    from helpers.tiny import tiny_model

    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    (adapter,) = write_prefixes(tmp_path, base, 5, 1).values()
    with Engine(transformers_engine, str(tmp_path / "base"), adapter, "float32", 1) as engine:
        assert engine.run([PromptRequest([3, 4, 5]), PromptRequest([6, 7, 8])], 2)["tokens_per_second"] > 0


def test_report(tmp_path: Path) -> None:
    results = tmp_path / "serving.json"
    records = []
    for comparison in comparisons(SETTINGS, "offline"):
        measurements = {
            candidate.name: [
                {"tokens_per_second": 100.0 + 10 * place + round_, "ttft_p50": 0.5, "itl_p50": 0.01, "blocks": 7}
                for round_ in range(3)
            ]
            for place, candidate in enumerate(comparison.candidates)
        }
        machine = {"accelerator": None, "cores": 2, "cpu": "A", "versions": {"torch": "2"}, "revision": "abc"}
        records.append(
            {
                "transport": "offline",
                "comparison": comparison.name,
                "machine": machine,
                "measurements": measurements,
            }
        )
    content = {"settings": SETTINGS.record(), "records": records}
    results.write_text(json.dumps(content), encoding="utf-8")
    page = tmp_path / "serving.md"
    page.write_text("\n".join(markers("serving")), encoding="utf-8")
    text = write_report(results, page)
    assert "| 1 prefix / 1 LoRA of rank 8 | offline | 0.910 (0.909 to 0.910) | 1.000" in text
    assert ratio_table(content) in page.read_text(encoding="utf-8")
    assert "| offline | base | no plugin | 101 | 0.5 |  | 0.01 | 7 |" in absolute_table(content)
    assert results.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.soak
@pytest.mark.timeout(1800)  # some twenty engines
def test_with_engines(tmp_path: Path) -> None:
    from helpers.serving import server, support

    support.write_model(tmp_path / "model", server.CONFIG, tokenizer=True)
    small = (
        "--lengths 32 50 --mixes 1 3 --loras 2 --ranks 8 --base-starts 1 --starts 2 --rounds 2 --requests 4 "
        "--mix-requests 4 --output-tokens 4"
    )
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--model",
        str(tmp_path / "model"),
        "--results",
        str(tmp_path / "results.json"),
    ]
    options = [*small.split(), "--dtype", "float32", "--block-size", "32", "--cache-gib", "1"]
    answered = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    records = {
        (one["transport"], one["comparison"]): one["measurements"]
        for one in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["records"]
    }
    offline = records["offline", "lengths"]
    assert [len(rounds) for rounds in offline.values()] == [4] * 6
    assert offline["text of 32"][0]["cached_tokens"] == offline["text of 32, same engine"][0]["cached_tokens"] == 32
    assert offline["prefix of 50"][0]["blocks"] >= 4
    assert offline["prefix of 32"][0]["loads_per_request"] == 0  # whole blocks, in the cache since the warm-up
    assert offline["prefix of 50"][0]["loads_per_request"] == 1  # of the 18 tokens in the last block
    assert all(
        one["tokens_per_second"] > 0 for found in records.values() for rounds in found.values() for one in rounds
    )
    assert "| prefix of 32 / cached text of 32, same engine | http |" in answered.stdout
