"""BLEU, NIST and ROUGE-L of answers against all reference sentences.

METEOR and CIDEr are missing: NLTK's METEOR needs a WordNet download, and no maintained package of reasonable size has CIDEr.
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
    """Scores one answer per item against all references of the item: BLEU and ROUGE-L from 0 to 100, and NIST."""
    return {
        "bleu": bleu(answers, references),
        "nist": nist(answers, references),
        "rouge_l": rouge_l(answers, references),
    }


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns sacrebleu's corpus BLEU with its default tokenizer."""
    most = max(map(len, references))
    # sacrebleu takes the i-th references of all items together, with None for items that have fewer.
    columns: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), columns).score)


def nist(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns NLTK's corpus NIST of lower-case words with n-grams up to 5. It has no upper bound."""
    words = [[_words(text) for text in texts] for texts in references]
    guesses = [_words(answer) for answer in answers]
    # NLTK divides by the number of n-grams, which is zero for very short answers.
    if max(map(len, guesses)) < NIST_ORDER:
        return 0.0
    return float(corpus_nist(words, guesses, n=NIST_ORDER))


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean over the items of the best ROUGE-L F-measure of any reference."""
    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(list(texts), answer)["rougeL"].fmeasure
        for answer, texts in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def _words(text: str) -> list[str]:
    return wordpunct_tokenize(text.lower())
