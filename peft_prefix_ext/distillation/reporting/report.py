"""The report on distilled prefixes: what they keep of their context, what they cost, and what else would do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from peft_prefix_ext.distillation.reporting.costs import Cost
from peft_prefix_ext.distillation.reporting.drift import Drift
from peft_prefix_ext.distillation.reporting.recovered_share import Separation

FULL = "full context"


@dataclass(frozen=True)
class Row:
    """One way to give the model its context, or none.

    Args:
        name: Its name.
        num_tokens: The tokens before the question.
        scores: The score of the answers; for prefixes one per seed.
        logprobs: The mean log-probability per token of the right answers, in nats, likewise.
        answers: The answers, by question; of the first seed.
        is_prefix: Whether it was trained.
    """

    name: str
    num_tokens: int
    scores: list[float]
    logprobs: list[float]
    answers: list[str] = field(default_factory=list)
    is_prefix: bool = False


@dataclass(frozen=True)
class Report:
    """What `evaluate` measured.

    Args:
        rows: "nothing" first, then the full context, then what else was compared, then the prefixes.
        metric: The name of the metric of the scores.
        score: Nothing and the full context by that metric.
        logprob: Nothing and the full context by the log-probability of the right answers.
        questions: The last message of each question.
        references: The right answers.
        num_own_references: How many of these are the full context's own answers.
        drift: The drift off topic by the name of the row, one for each seed.
        costs: The full context as text, the same in the cache, and the prefix.
        seconds_spent: The time that one prefix took to make, if known.
        requests_until_paid: After how many requests it has paid, if it does.
        sources: The SHA-256 of each source, and of the tokenizer's chat template.
        settings: What else it takes to make the report again.
    """

    rows: list[Row]
    metric: str
    score: Separation
    logprob: Separation
    questions: list[str]
    references: list[str]
    num_own_references: int
    drift: dict[str, list[Drift]]
    costs: list[Cost]
    seconds_spent: float | None
    requests_until_paid: float | None
    sources: dict[str, str]
    settings: dict[str, Any]

    def recovered_shares(self, row: Row) -> list[float] | None:
        """Returns the recovered share of a row by its scores, one for each seed; `None` if there is no verdict."""
        return _shares(self.score, row.scores)

    def recovered_logprob_shares(self, row: Row) -> list[float] | None:
        """Returns the recovered share by the log-probability of the right answers, one for each seed."""
        return _shares(self.logprob, row.logprobs)

    def verdict(self) -> list[str]:
        """Returns sentences on each measure: what is recovered, and whether something simpler does as well."""
        sentences = []
        for name, measure, values in (
            (self.metric, self.score, {row.name: row.scores for row in self.rows}),
            ("log-probability", self.logprob, {row.name: row.logprobs for row in self.rows}),
        ):
            if not measure.is_clear:
                sentences.append(_no_verdict(name, measure, len(self.questions)))
                continue
            others = [row.name for row in self.rows[1:] if row.name != FULL and not row.is_prefix]
            best = max(others, key=lambda other: values[other][0], default=None)
            for row in self.rows:
                if row.is_prefix:
                    shares = _shares(measure, values[row.name]) or []
                    sentences.append(
                        f"By {name}, {row.name} recovers {spread(shares)} of what the full context adds"
                        f"{_beside(values[row.name], best, values[best][0]) if best else ''}."
                    )
        if self.num_own_references:
            sentences.append(
                f"For {self.num_own_references} of {len(self.questions)} questions no right answer is known, and the full context's "
                "own counts as right: there the scores say how far it is followed, not whether it is right."
            )
        return sentences

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote."""
        found = json.loads(text)
        return cls(
            **{
                **found,
                "rows": [Row(**row) for row in found["rows"]],
                "score": _separation(found["score"]),
                "logprob": _separation(found["logprob"]),
                "drift": {name: [Drift(**each) for each in seeds] for name, seeds in found["drift"].items()},
                "costs": [Cost(**cost) for cost in found["costs"]],
            }
        )


def spread(values: Sequence[float]) -> str:
    """Returns a number as text: the mean, and the least and the greatest if there are several."""
    mean = number(fmean(values))
    return f"{mean} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else mean


def number(value: float) -> str:
    """Returns a number as text, with about three digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _shares(measure: Separation, values: Sequence[float]) -> list[float] | None:
    shares = [share for value in values if (share := measure.recovered_share(value)) is not None]
    return shares or None


def _separation(found: Mapping[str, Any]) -> Separation:
    interval = found["interval"]
    return Separation(found["nothing"], found["full"], None if interval is None else (interval[0], interval[1]))


def _no_verdict(name: str, measure: Separation, num_questions: int) -> str:
    if measure.interval is None:
        return f"By {name} there is no verdict: {num_questions} questions are too few."
    low, high = map(number, measure.interval)
    if measure.interval[1] < 0:
        return f"By {name} there is no verdict: the full context is worse than nothing (difference {low} to {high})."
    return (
        f"By {name} there is no verdict: nothing and the full context do not separate on {num_questions} questions (95 % "
        f"interval of the difference {low} to {high})."
    )


def _beside(prefixes: Sequence[float], best: str, baseline: float) -> str:
    """Returns how prefixes compare with the best of the other openings."""
    if min(prefixes) > baseline:
        order = "is ahead of"
    elif max(prefixes) < baseline:
        order = "is behind"
    elif len(prefixes) > 1:
        order = "does not differ by more than its seeds from"
    else:
        order = "equals"
    return f", and {order} the best of the other openings, {best} ({spread(prefixes)} against {number(baseline)})"
