"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
import traceback
from typing import Any

import msgspec
from starlette.responses import Response

from ..errors import (
    CapacityError,
    DeployError,
    GrammarError,
    MissingDependencyError,
    PromptError,
    QueueFullError,
    SamplingError,
    SessionClosedError,
    TemplateError,
    UsageError,
)

_log = logging.getLogger("medusa_deploy.serve")
_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_FIELDS = {"max_new_tokens": "max_tokens", "include_stop": "include_stop_str_in_output"}
_UNAVAILABLE = "service_unavailable"


class ApiError(Exception):
    """A refusal: its HTTP status, the message, the parameter that it is about, and a code for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body, self.status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``body`` as JSON."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def api_error(error: Exception, *, param: str | None = None) -> ApiError:
    """Return the refusal that ``error`` becomes.

    What a client can correct is 400. A full queue is 429. A server that isn't ready is 503. Only failures of the engine, and
    our own bugs, are 500; those are logged, without the texts that an exception's message may hold.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        message = f"{error.message}; try again in {error.retry_after:.1f} s"
        return ApiError(429, message, code="queue_full", retry_after=error.retry_after)
    if isinstance(error, SessionClosedError):
        return shutting_down()
    if isinstance(error, CapacityError):
        return ApiError(400, _with_hint(error), param=param, code="context_length_exceeded")
    if isinstance(error, TemplateError):
        param = error.argument or "messages"
        return ApiError(400, error.message, param=param, code="template_error")
    if isinstance(error, SamplingError):
        return ApiError(400, _with_hint(error), param=error.message.split()[0], code="invalid_value")
    if isinstance(error, GrammarError):
        return ApiError(400, _with_hint(error), param=param, code="invalid_grammar")
    if isinstance(error, MissingDependencyError):
        return ApiError(501, _with_hint(error), param=param, code="missing_dependency")
    if isinstance(error, UsageError) and error.argument is not None:
        param = _FIELDS.get(error.argument, error.argument)
    if isinstance(error, (PromptError, UsageError)):
        return ApiError(400, _with_hint(error), param=param, code="invalid_value")
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("failed", extra={"fields": {"error": type(error).__name__, "frames": frames}})
    message = error.message if isinstance(error, DeployError) else "the server failed; its log has the details"
    return ApiError(500, message, code=type(error).__name__)


def not_ready() -> ApiError:
    """Return the refusal of a server that is still loading."""
    return ApiError(503, "the model is being loaded", code=_UNAVAILABLE, retry_after=1)


def shutting_down() -> ApiError:
    """Return the refusal of a server that stops."""
    return ApiError(503, "the server is shutting down", code=_UNAVAILABLE, retry_after=1)


def _with_hint(error: DeployError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
