"""A StatusError over HTTP: status, headers, and a body in the format of the API that was called."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import grpc

from scalellm.services.common.errors import StatusError

_Code = grpc.StatusCode


class HttpError(StatusError):
    """An error whose HTTP status has no counterpart in gRPC.

    Args:
        status: HTTP status.
        message: One sentence for the client.
        code: The nearest gRPC status, under which it is counted.
        field: The field at fault.
    """

    def __init__(
        self, status: int, message: str, code: grpc.StatusCode = _Code.INVALID_ARGUMENT, *, field: str = ""
    ) -> None:
        super().__init__(code, message, field=field)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Kind:
    """The representation of errors with one gRPC status.

    Attributes:
        status: HTTP status.
        openai: `type` of the error in OpenAI's APIs.
        anthropic: The same in Anthropic's.
        code: `code` in OpenAI's APIs.
    """

    status: int
    openai: str
    anthropic: str
    code: str | None = None


_INVALID = _Kind(400, "invalid_request_error", "invalid_request_error")
_SERVER = _Kind(500, "server_error", "api_error")
_KINDS: Mapping[grpc.StatusCode, _Kind] = MappingProxyType(
    {
        _Code.INVALID_ARGUMENT: _INVALID,
        _Code.FAILED_PRECONDITION: _INVALID,
        _Code.OUT_OF_RANGE: _INVALID,
        _Code.UNAUTHENTICATED: _Kind(401, "authentication_error", "authentication_error", "invalid_api_key"),
        _Code.PERMISSION_DENIED: _Kind(403, "permission_error", "permission_error", "permission_denied"),
        _Code.NOT_FOUND: _Kind(404, "not_found_error", "not_found_error", "not_found"),
        _Code.ALREADY_EXISTS: _Kind(409, "conflict_error", "invalid_request_error", "already_exists"),
        _Code.RESOURCE_EXHAUSTED: _Kind(429, "rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
        _Code.CANCELLED: _Kind(499, "cancelled_error", "api_error", "cancelled"),
        _Code.UNIMPLEMENTED: _Kind(501, "not_implemented_error", "api_error", "unimplemented"),
        _Code.ABORTED: _Kind(503, "service_unavailable_error", "overloaded_error", "aborted"),
        _Code.UNAVAILABLE: _Kind(503, "service_unavailable_error", "overloaded_error", "unavailable"),
        _Code.DEADLINE_EXCEEDED: _Kind(504, "timeout_error", "timeout_error", "deadline_exceeded"),
    }
)

_NO_MODEL = replace(_KINDS[_Code.NOT_FOUND], code="model_not_found")

# Clients retry 409 and 5xx, but a retry after one of these statuses would give the same error.
_FINAL = frozenset((_Code.ALREADY_EXISTS, _Code.DEADLINE_EXCEEDED, _Code.UNIMPLEMENTED))


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """The format of errors of one API.

    Attributes:
        body: Writes an error.
        event: Text before it in a stream that has begun.
    """

    body: Callable[[StatusError], bytes]
    event: bytes = b"data: "

    def as_event(self, error: StatusError) -> bytes:
        """Return an error as the last event of a stream."""
        return self.event + self.body(error) + b"\n\n"


def _kind(error: StatusError) -> _Kind:
    if error.code is _Code.NOT_FOUND and error.field == "model":
        return _NO_MODEL
    return _KINDS.get(error.code, _SERVER)


def http_status(error: StatusError) -> int:
    """Return the HTTP status of an error that occurs before the answer has begun."""
    return error.status if isinstance(error, HttpError) else _kind(error).status


def error_headers(error: StatusError) -> dict[str, str]:
    """Return the headers that tell the client when to retry, or not to."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1e3)))
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))  # HTTP allows whole seconds only
    if error.code in _FINAL:
        headers["x-should-retry"] = "false"
    if error.code is _Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return headers


def openai_error(error: StatusError) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    kind = _kind(error)
    value = {"message": error.message, "type": kind.openai, "param": error.field or None, "code": kind.code}
    return json.dumps({"error": value}).encode()


def error_code(error: StatusError) -> str:
    """Return OpenAI's name for the kind of an error."""
    kind = _kind(error)
    return kind.code or kind.openai


def anthropic_error(error: StatusError) -> bytes:
    """`{"type": "error", "error": {type, message}}`."""
    kind = "request_too_large" if http_status(error) == 413 else _kind(error).anthropic
    return json.dumps({"type": "error", "error": {"type": kind, "message": error.message}}).encode()


OPENAI_ERRORS = ErrorFormat(openai_error)
ANTHROPIC_ERRORS = ErrorFormat(anthropic_error, b"event: error\ndata: ")
