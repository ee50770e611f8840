"""Errors of single requests. They derive from vLLM's own, so import this module only where vLLM is installed."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm import exceptions
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

# vLLM 0.32 has a class of its own for what a client may try again. Before, an error said its status by itself.
_Retryable: Any = getattr(exceptions, "RetryableRequestError", None)


class PrefixRequestError(VLLMValidationError, ValueError):
    """The request is refused: HTTP 400 on a server, a `ValueError` offline."""


class PrefixUnavailableError(_Retryable or GracefulHTTPError):  # type: ignore[misc]
    """The prefix of the request could not be read: HTTP 503 with this message and without a stack trace."""

    def __init__(self, message: str) -> None:
        super().__init__(*((message,) if _Retryable else (message, HTTPStatus.SERVICE_UNAVAILABLE)))
