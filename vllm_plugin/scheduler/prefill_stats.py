"""Usage and metrics of a prompt with a prefix count real tokens only."""

from __future__ import annotations

from vllm.v1.metrics.stats import PrefillStats


class RealPrefillStats(PrefillStats):
    """vLLM's prefill statistics without virtual tokens.

    Args:
        num_virtual_tokens: p.
    """

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        # Attributes with an underscore are not sent to the front end.
        self._num_virtual_tokens = num_virtual_tokens

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        p = self._num_virtual_tokens
        local = max(0, num_local_cached_tokens - p)
        cached = max(0, num_local_cached_tokens + num_external_cached_tokens - p)
        super().set(
            num_prompt_tokens=num_prompt_tokens - p,
            num_local_cached_tokens=local,
            num_external_cached_tokens=cached - local,
        )

    def finalize(self, num_cached_tokens: int) -> None:
        super().finalize(max(0, num_cached_tokens - self._num_virtual_tokens))
