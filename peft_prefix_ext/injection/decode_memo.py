"""What a cache remembers of the decoding loop it belongs to: what need not be computed again, and behind which prefix."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

# The attribute of a cache that holds what was computed for the loop it belongs to, and goes with it.
_MEMO = "_prefix_ext_memo"
# The attribute of a cache that says how many virtual tokens its tokens stand behind.
_OFFSETS = "_prefix_ext_offsets"


def memoize_for_decoding(cache: Any, slot: Hashable, state: Any, is_decoding: bool, compute: Callable[[], Any]) -> Any:
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


def check_cache_offset(cache: Any, offsets: tuple[int, ...]) -> None:
    """Notes how many virtual tokens the tokens of a cache stand behind.

    Args:
        cache: The cache that the steps of a decoding loop hand on, or `None`.
        offsets: How many there are in the step under way, row by row.

    Raises:
        ValueError: If there are tokens in it that stand behind another number.
    """
    if cache is None or torch.compiler.is_compiling():
        return
    before: tuple[int, ...] | None = getattr(cache, _OFFSETS, None)
    if before == offsets:
        return
    # Where rows were added or taken out of it, which ones is not known.
    goes_on = before is None or (len(before) != len(offsets) and set(offsets) <= set(before))
    if not goes_on and int(cache.get_seq_length()) > 0:
        raise ValueError(
            "The tokens in the cache were read behind a prefix of another length, or behind none, and stand at other "
            "positions than the ones to come: start with an empty cache."
        )
    setattr(cache, _OFFSETS, offsets)
