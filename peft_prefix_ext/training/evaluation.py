"""How good a prefix is on examples: the loss of the right answers, and what free answers share with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.generation.transformers_generator import TransformersGenerator
from peft_prefix_ext.training.columns import Row
from peft_prefix_ext.training.samples import ADAPTER, Sample, answer_examples, split_tokens


def loss(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    prefix: str | None = ADAPTER,
    batch_size: int = 8,
    progress: bool = False,
) -> float:
    """Returns the mean negative log-probability of the answers of examples, in nats per token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The examples.
        prefix: The name of the adapter, `None` for the base model alone.
        batch_size: How many are scored at a time.
        progress: Whether to show a progress bar.
    """
    generator = TransformersGenerator(model, tokenizer, batch_size=batch_size, progress=progress)
    prompts, answers = zip(*(split_tokens(row, tokenizer) for row in rows), strict=True)
    scores = generator.score(prompts, answers, top_k=1, prefix=prefix)
    logprobs = [each for score in scores for each in score.answer]
    return -sum(logprobs) / len(logprobs)


def exact_match(samples: Sequence[Sample]) -> float:
    """Returns how many answers of a hundred are the right one, but for space around it."""
    return 100 * sum(sample.answer.strip() == sample.expected.strip() for sample in samples) / len(samples)


def bleu(samples: Sequence[Sample]) -> float:
    """Returns sacrebleu's corpus BLEU, 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu([each.answer for each in samples], [[each.expected for each in samples]]).score)


def rouge_l(samples: Sequence[Sample]) -> float:
    """Returns the mean F-measure of ROUGE-L, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return 100 * sum(scorer.score(each.expected, each.answer)["rougeL"].fmeasure for each in samples) / len(samples)


# The metrics of free answers, with the package that each needs.
METRICS: dict[str, tuple[Callable[[Sequence[Sample]], float], str | None]] = {
    "exact_match": (exact_match, None),
    "bleu": (bleu, "sacrebleu"),
    "rouge_l": (rouge_l, "rouge_score"),
}
LOSS = "loss"


def check_metrics(names: Sequence[str]) -> None:
    """Raises `ValueError` if the package of a metric is not installed."""
    for name in names:
        package = METRICS[name][1] if name in METRICS else None
        if package is not None and find_spec(package) is None:
            raise ValueError(f"The metric {name} needs {package}; install the extra `train`.")


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    prefix: str | None = ADAPTER,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """Returns the metrics by name.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The examples.
        names: `loss`, and names of `METRICS`.
        prefix: The name of the adapter, `None` for the base model alone.
        max_new_tokens: The length of the longest free answer, in tokens.
        batch_size: How many examples are scored or answered at a time.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the package of a metric is not installed.
    """
    check_metrics(names)
    common = {"prefix": prefix, "batch_size": batch_size, "progress": progress}
    found = {}
    if LOSS in names:
        found[LOSS] = loss(model, tokenizer, rows, **common)  # type: ignore[arg-type]
    if wanted := [name for name in names if name in METRICS]:
        samples = answer_examples(model, tokenizer, rows, max_new_tokens=max_new_tokens, **common)  # type: ignore[arg-type]
        found |= {name: METRICS[name][0](samples) for name in wanted}
    return found
