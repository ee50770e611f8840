"""What the results are to show, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.interleaving import ratio
from benchmarks.common.results import Record
from benchmarks.gpu.plan import KERNELS, PARITY, SERVING, TRAINING
from benchmarks.serving.comparisons import SAME_ENGINE, count
from benchmarks.training.steps import STOCK_FLAT, STOCK_MLP

# Of prefixes that fill whole blocks of vLLM's cache, so that no request copies any.
BLOCK = 16
MANY = 64


@dataclass(frozen=True)
class Goal:
    """One figure and its limit.

    Args:
        step: The step that measured it.
        what: What is measured.
        found: The figure.
        limit: The least or greatest value that is good.
        at_least: Whether it is the least.
    """

    step: str
    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit


def goals(records: list[Record]) -> Iterator[Goal]:
    """Yields the goals that the results of these steps speak to."""
    for record in records:
        if record.get("result"):
            yield from _BY_KIND.get(record["kind"], _none)(record["step"], record["result"])


def _none(step: str, result: Record) -> Iterator[Goal]:
    yield from ()


def _kernels(step: str, result: Record) -> Iterator[Goal]:
    yield Goal(step, "all kernels right", float(result["ok"]), 1, at_least=True)


def _parity(step: str, result: Record) -> Iterator[Goal]:
    base, prefixes = result["groups"]["base"], result["groups"]["prefixes"]
    if result["dtype"] == "float32":
        share = prefixes["equal"] / prefixes["answers"]
        yield Goal(step, "share of answers equal to `PeftModel.generate`", share, 1, at_least=True)
    else:
        distance = prefixes["engine"]["mean"] / base["engine"]["mean"]
        yield Goal(step, "distance of log-probabilities from float32, prefixes / base model", distance, 1)


def _serving(step: str, content: Record) -> Iterator[Goal]:
    measured = {record["comparison"]: record["measurements"] for record in content["records"]}
    for length in content["settings"]["lengths"] if "lengths" in measured else ():
        if length % BLOCK == 0:
            ours, theirs = f"prefix of {length}", f"text of {length}{SAME_ENGINE}"
            rounds = measured["lengths"][ours], measured["lengths"][theirs]
            title = f"{ours} / cached text"
            yield Goal(step, f"{title}, tokens/s", ratio(*rounds, "tokens_per_second")["median"], 0.98, at_least=True)
            yield Goal(step, f"{title}, time to first token", ratio(*rounds, "ttft_p50")["median"], 1.03)
    if (found := measured.get(f"LoRA, {MANY}")) is not None:
        ours = count(MANY, "prefix", "prefixes")
        theirs = f"{count(MANY, 'LoRA', 'LoRA')} of rank {content['settings']['ranks'][0]}"
        value = ratio(found[ours], found[theirs], "tokens_per_second")["median"]
        yield Goal(step, f"{ours} / {theirs}, tokens/s", value, 1.2, at_least=True)


def _training(step: str, content: Record) -> Iterator[Goal]:
    for cell in content["records"]:
        for ours, theirs in (("ours, flat", STOCK_FLAT), ("ours, MLP", STOCK_MLP)):
            value = cell["methods"][ours]["ratios"][theirs]["median"]
            what = f"batch {cell['batch']}, prefix {cell['prefix']}: step of {ours} / {theirs}"
            yield Goal(step, what, value, 1)


_BY_KIND = {KERNELS: _kernels, PARITY: _parity, SERVING: _serving, TRAINING: _training}
