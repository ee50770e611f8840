"""Throughput and latency of a batch of requests."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.common.interleaving import Measurement


def summarize(seconds: float, num_tokens: int, first: Sequence[float], between: Sequence[float]) -> Measurement:
    """Returns throughput, time to the first token (TTFT) and inter-token latency (ITL).

    Args:
        seconds: From the first request to the last token.
        num_tokens: Output tokens of all requests.
        first: Seconds to the first token, per request.
        between: Mean seconds between tokens, per request.
    """
    return {
        "tokens_per_second": num_tokens / seconds,
        "ttft_p50": median(first),
        "ttft_p99": percentile(first, 0.99),
        "itl_p50": median(between),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Returns a percentile, given as a share from 0 to 1, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
