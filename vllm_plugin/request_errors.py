"""Errors of single requests. They derive from vLLM's own, so import this module only where vLLM is installed."""

from __future__ import annotations

from vllm.exceptions import RetryableRequestError, VLLMValidationError


class PrefixRequestError(VLLMValidationError, ValueError):
    """The request is refused: HTTP 400 on a server, a `ValueError` offline."""


class PrefixUnavailableError(RetryableRequestError):
    """The prefix of the request could not be read: HTTP 503 with this message and without a stack trace."""
