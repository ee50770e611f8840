"""Costs are medians of what each candidate takes, measured in turns."""

from __future__ import annotations

import pytest

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model
from peft_prefix_ext.checkpoint.reader import read_prefix
from peft_prefix_ext.distillation.reporting import costs
from peft_prefix_ext.distillation.reporting.costs import (
    Candidate,
    Cost,
    measure_costs,
    requests_until_paid,
    size_at_length,
    unlike_any_before,
)


class Clock:
    """A generator for which time passes as its prefixes say, and the time."""

    def __init__(self, seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def generate(self, prompts, *, max_new_tokens, prefix=None):
        self.calls.append((prefix, prompts, max_new_tokens))
        slow = 1000 if len(self.calls) <= 4 else 1  # the first round warms up
        self.now += slow * self.seconds[prefix] * (1 if max_new_tokens == 1 else 10)
        return [[0] * max_new_tokens for _ in prompts]


PROMPTS = [[number, *range(100, 120)] for number in range(3)]


def test_measured_in_turns(monkeypatch):
    clock = Clock({None: 2.0, "short": 0.5})
    monkeypatch.setattr(costs, "time", clock)
    candidates = [
        Candidate("text", 100, 6400, PROMPTS, is_cached=False),
        Candidate("prefix", 4, 256, PROMPTS, "short"),
    ]
    found = measure_costs(clock, candidates, num_requests=2, max_new_tokens=5, repetitions=2)
    assert found == [Cost("text", 100, 6400, 2.0, 10 / 20), Cost("prefix", 4, 256, 0.5, 10 / 5)]
    assert [(prefix, len(prompts), new) for prefix, prompts, new in clock.calls] == [
        (None, 1, 1),
        (None, 2, 5),
        ("short", 1, 1),
        ("short", 2, 5),
    ] * 3
    # What must not be cached never comes twice; the others are the prompts as they are.
    sent = {
        prefix: [prompt for name, prompts, _ in clock.calls if name == prefix for prompt in prompts]
        for prefix in clock.seconds
    }
    assert all(prompt in PROMPTS for prompt in sent["short"])
    assert len({tuple(prompt) for prompt in sent[None]}) == len(sent[None])
    assert {len(prompt) for prompt in sent[None]} == {21}


def test_other_starts_are_of_the_same_length_and_vocabulary():
    prompt = list(range(200))
    found = [unlike_any_before(prompt) for _ in range(20)]
    assert len({tuple(each[:4]) for each in found}) == 20
    assert all(len(each) == 200 and set(each) <= set(prompt) and each[4:] == prompt[4:] for each in found)
    assert len(unlike_any_before([7, 8])) == 2


def test_requests_until_paid():
    text, prefix = (Cost("", 1, 1, seconds, 1.0) for seconds in (0.5, 0.3))
    assert requests_until_paid(60.0, text, prefix) == pytest.approx(300)
    assert requests_until_paid(60.0, prefix, text) is None
    assert requests_until_paid(60.0, text, text) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])
def test_the_size_at_another_length(architecture, tmp_path):
    for p in (3, 12):
        with_prefix(tiny_model(architecture), num_virtual_tokens=p).save_pretrained(str(tmp_path / str(p)))
    short, long = (read_prefix(tmp_path / str(p)) for p in (3, 12))
    assert size_at_length(short, 12) == long.num_bytes
    assert size_at_length(long, 3) == short.num_bytes
