"""What can go wrong: the server cannot start, a request cannot be served, or not at this moment."""

from __future__ import annotations

from functools import cache

NO_VLLM = (
    "vLLM is not installed; install this package with its extra `serve` (`pip install '.[serve]'` in a clone), or `serve-cpu` "
    "for vLLM's CPU build."
)


class PrefixServeError(ValueError):
    """The engine cannot start with these prefix adapters: the message says why and what to do, in one sentence."""


class AdapterNotFoundError(PrefixServeError):
    """There is no adapter where one should be read."""


@cache
def request_error_type() -> type[ValueError]:
    """Returns the exception of a refused request: HTTP 400 on a server, a `ValueError` offline.

    Built on demand: vLLM's server tells client errors by a class of its own, and this module must import without vLLM.
    """
    from vllm.exceptions import VLLMValidationError

    return type("PrefixRequestError", (VLLMValidationError, ValueError), {"__module__": __name__})


@cache
def unavailable_error_type() -> type[Exception]:
    """Returns the exception of a request whose prefix could not be read: HTTP 503, with its message, and no stack trace."""
    from vllm.exceptions import RetryableRequestError

    return type("PrefixUnavailableError", (RetryableRequestError,), {"__module__": __name__})
