"""What the log says of the adapters that an engine starts with, and of each adapter that is loaded later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_plugin.adapters.registry import Adapter
from vllm_plugin.adapters.speculation import warn_of_drafts
from vllm_plugin.logger import logger

# More adapters than this are summed up in one line.
MAX_LINES = 20


def log_cache(block_size: int, *, is_hybrid: bool = False) -> None:
    """Logs the block size, which differs by platform and backend. Prefixes of a multiple of it fill whole blocks.

    Args:
        block_size: Tokens per block of the cache.
        is_hybrid: Whether the model has recurrent layers.
    """
    logger.info(
        "Blocks of the KV cache hold %d tokens (--block-size%s).",
        block_size,
        ", raised by vLLM until a block is as large as the state of a recurrent layer" if is_hybrid else "",
    )


def log_adapters(adapters: Sequence[Adapter], block_size: int, itemsize: int) -> None:
    """Logs a line per adapter, and a warning with the adapters whose last block is not full.

    Args:
        adapters: The adapters.
        block_size: Tokens per block of the cache.
        itemsize: Bytes per number of the model's dtype.
    """
    for adapter in adapters[: MAX_LINES if len(adapters) <= MAX_LINES else 0]:
        p = adapter.spec.num_virtual_tokens
        logger.info(
            "Prefix adapter %r: %d virtual tokens, %d layers%s, %.2f MiB, %s%s.",
            adapter.spec.name,
            p,
            len(adapter.shapes),
            f" and the states of {len({state.layer for state in adapter.states})}" if adapter.states else "",
            num_bytes(adapter, itemsize) / 2**20,
            f"a tail of {p % block_size} tokens" if p % block_size else "aligned",
            "" if adapter.spec.draft is None else ", with a prefix for the draft model",
        )
    if len(adapters) > MAX_LINES:
        logger.info(
            "%d prefix adapters: %d virtual tokens, %.2f MiB.",
            len(adapters),
            sum(adapter.spec.num_virtual_tokens for adapter in adapters),
            sum(num_bytes(adapter, itemsize) for adapter in adapters) / 2**20,
        )
    if advice := [advise(adapter, block_size) for adapter in adapters if adapter.spec.num_virtual_tokens % block_size]:
        more = f" So it is with {len(advice) - 5} more." if len(advice) > 5 else ""
        logger.warning(
            "Virtual tokens past the last full block of %d tokens are copied for each request; prefixes of a multiple of "
            "that are shared whole: %s.%s",
            block_size,
            ", ".join(advice[:5]),
            more,
        )


def log_loaded(adapter: Adapter, block_size: int | None, vllm_config: Any) -> None:
    """Logs an adapter that is loaded while the engine runs.

    Args:
        adapter: The adapter.
        block_size: Tokens per block of the cache, if the engine has said so.
        vllm_config: The engine's config.
    """
    warn_of_drafts([adapter.spec], vllm_config)
    logger.info("Loaded prefix adapter: name '%s', path '%s'", adapter.spec.name, adapter.spec.source)
    if block_size is not None:
        log_adapters([adapter], block_size, vllm_config.model_config.dtype.itemsize)


def advise(adapter: Adapter, block_size: int) -> str:
    """Returns the nearest lengths that fill whole blocks."""
    p = adapter.spec.num_virtual_tokens
    lower = p // block_size * block_size
    return f"{adapter.spec.name!r} ({p}; better {f'{lower} or ' if lower else ''}{lower + block_size})"


def num_bytes(adapter: Adapter, itemsize: int) -> int:
    """Returns the size of an adapter in the model's dtype, over all workers."""
    per_token = sum(heads * (key_size + value_size) for _, heads, key_size, value_size in adapter.shapes)
    states = sum(math.prod(state.shape) for state in adapter.states)
    return (per_token * adapter.spec.num_virtual_tokens + states) * itemsize
