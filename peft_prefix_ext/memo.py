"""What a decoding loop need not compute again at every token."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# The attribute of a cache that holds what was computed for the loop it belongs to, and goes with it.
_MEMO = "_prefix_ext_memo"


def remembered(cache: Any, slot: Hashable, state: Any, is_decoding: bool, compute: Callable[[], Any]) -> Any:
    """Returns `compute()`, or what it returned when the loop that owns `cache` last asked with the same `state`.

    Only a decoding step is answered from memory: a prefill finds weights that changed in ways `state` cannot see.

    Args:
        cache: The cache that the steps of a decoding loop hand on, or `None`.
        slot: What is asked for.
        state: All that it depends on, such as the versions of parameters.
        is_decoding: Whether a single token is under way.
        compute: Gives the answer.
    """
    if cache is None:
        return compute()
    memo: dict[Hashable, tuple[Any, Any]] | None = getattr(cache, _MEMO, None)
    if memo is None:
        memo = {}
        setattr(cache, _MEMO, memo)
    if not is_decoding or slot not in memo or memo[slot][0] != state:
        memo[slot] = (state, compute())
    return memo[slot][1]
