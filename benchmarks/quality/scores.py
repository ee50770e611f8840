"""The scores of a set of answers, each against all the sentences that people wrote for the same facts.

METEOR and CIDEr are left out: NLTK's METEOR needs WordNet, which no kept package brings, and of those with CIDEr one is
unkept since 2020 and the other installs two audio models' libraries with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sacrebleu
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer

NIST_ORDER = 5


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns BLEU and ROUGE-L from 0 to 100, and NIST, of one answer per item against all of the item's references."""
    return {
        "bleu": bleu(answers, references),
        "nist": nist(answers, references),
        "rouge_l": rouge_l(answers, references),
    }


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns sacrebleu's corpus BLEU with its default tokenizer."""
    most = max(map(len, references))
    # sacrebleu wants the i-th references of all items together, and None where an item has fewer.
    columns: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), columns).score)


def nist(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns NLTK's corpus NIST of lower-case words, up to n-grams of order 5; longer answers may score higher."""
    words = [[_words(text) for text in texts] for texts in references]
    guesses = [_words(answer) for answer in answers]
    # NLTK divides by the number of n-grams, of which very short answers have none.
    if max(map(len, guesses)) < NIST_ORDER:
        return 0.0
    return float(corpus_nist(words, guesses, n=NIST_ORDER))


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean over the items of the best F-measure of the longest common subsequence."""
    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(list(texts), answer)["rougeL"].fmeasure
        for answer, texts in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def _words(text: str) -> list[str]:
    return wordpunct_tokenize(text.lower())
