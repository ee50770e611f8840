"""Errors of adapters, options and engines. For errors of single requests, see `request_errors`."""

from __future__ import annotations

NO_VLLM = (
    "vLLM is not installed; install this package with its extra `serve` (`pip install '.[serve]'` in a clone), or `serve-cpu` "
    "for vLLM's CPU build."
)


class PrefixServeError(ValueError):
    """An adapter, an option or an engine is not usable. The message says in one sentence why, and what to do."""


class AdapterNotFoundError(PrefixServeError):
    """There is no adapter at the given path or repository."""
