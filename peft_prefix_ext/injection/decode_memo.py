"""What is kept on a cache for its decoding loop: the prefix that was computed, and the offset of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from peft_prefix_ext.injection.position_ids import num_cached_tokens

# The attribute of a cache that holds results for its decoding loop, and is freed with it.
_MEMO = "_prefix_ext_memo"
# The attribute of a cache that holds the number of virtual tokens before each of its rows.
_OFFSETS = "_prefix_ext_offsets"


def memoize_for_decoding(cache: Any, key: Hashable, state: Any, is_decoding: bool, compute: Callable[[], Any]) -> Any:
    """Returns `compute()`, or in a decoding step what it returned before for the same cache, key and state.

    A prefill always computes anew, since `state` cannot show every change of weights.

    Args:
        cache: The cache of the decoding loop, or `None`.
        key: The name of the result.
        state: What the result depends on, such as versions of parameters, to compare with `==`.
        is_decoding: Whether there is one new token.
        compute: Computes the result.
    """
    if cache is None:
        return compute()
    memo: dict[Hashable, tuple[Any, Any]] | None = getattr(cache, _MEMO, None)
    if memo is None:
        memo = {}
        setattr(cache, _MEMO, memo)
    if not is_decoding or key not in memo or memo[key][0] != state:
        memo[key] = (state, compute())
    return memo[key][1]


def check_cache_offset(cache: Any, offsets: tuple[int, ...]) -> None:
    """Checks that the new tokens continue the positions of those in the cache, and records their offset.

    Args:
        cache: The cache, or `None`.
        offsets: How many virtual tokens precede each row of the forward pass.

    Raises:
        ValueError: If the tokens in the cache have another offset, as with another adapter.
    """
    if cache is None or torch.compiler.is_compiling():
        return
    cached: tuple[int, ...] | None = getattr(cache, _OFFSETS, None)
    if cached == offsets:
        return
    # If `generate` repeated or dropped rows, which ones is unknown.
    may_continue = cached is None or (len(cached) != len(offsets) and set(offsets) <= set(cached))
    if not may_continue and num_cached_tokens(cache) > 0:
        raise ValueError(
            "The tokens in the cache were computed after a prefix of another length, or without one, so the new tokens "
            "would continue at wrong positions: start with an empty cache."
        )
    setattr(cache, _OFFSETS, offsets)
