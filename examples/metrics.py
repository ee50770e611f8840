"""The two scores of the demo: BLEU of sentences (with sacrebleu) and F1 of extracted facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sacrebleu
from e2e import Facts


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the corpus BLEU, 0 to 100, of one hypothesis per item against all of the item's references."""
    most = max(len(texts) for texts in references)
    # sacrebleu takes one list per reference index, with None where an item has fewer references.
    columns: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(hypotheses), columns).score)


def slot_f1(answers: Sequence[str], expected: Sequence[Facts]) -> float:
    """Returns the micro-averaged F1, 0 to 1, of all (slot, value) pairs; an answer that is not JSON has no pairs."""
    hits = predicted = wanted = 0
    for answer, facts in zip(answers, expected, strict=True):
        found, gold = _pairs(parse_answer(answer)), _pairs(facts)
        hits += len(found & gold)
        predicted += len(found)
        wanted += len(gold)
    return 2 * hits / (predicted + wanted) if predicted + wanted else 0.0


def parse_answer(answer: str) -> Facts:
    """Returns the first JSON object in `answer`, ignoring text around it, or an empty dict."""
    start = answer.find("{")
    try:
        value, _ = json.JSONDecoder().raw_decode(answer[max(start, 0) :])
    except json.JSONDecodeError:
        return {}
    return {str(slot): str(content) for slot, content in value.items()} if isinstance(value, dict) else {}


def _pairs(facts: Facts) -> set[tuple[str, str]]:
    return {(slot.strip().lower(), value.strip().lower()) for slot, value in facts.items()}
