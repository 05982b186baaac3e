"""One HTTP request: who sends it, its id, its deadlines, and its body within bounds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping

import grpc
from aiohttp import web

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.http.deadline import Deadline
from scalellm.services.tokenizer.http.errors import HttpError
from scalellm.services.tokenizer.http.event_stream import EventStream
from scalellm.services.tokenizer.json_object import JsonObject, parse_object
from scalellm.services.tokenizer.validation import is_id

_TOTAL_TIMEOUT = "request-timeout-ms"
_READ_TIMEOUT = "x-stainless-read-timeout"
_LONGEST_TIMEOUT = 1e9


class HttpCall:
    """One request of a client, from its head on.

    Args:
        request: As it came.
        path: Path of the route, with names in braces for what differs: `/v1/models/{model}`.

    Attributes:
        given_id: The client's `x-request-id` if it is a valid id; empty: there is none.
        request_id: `given_id`, or an id that is made here.
        metadata: The headers that the request path reads, as gRPC metadata.
        stream: The answer, once it is a stream of events that has begun.
        error_event: Writes an error as the last event of the stream, where it is not the API's usual one.
    """

    def __init__(self, request: web.Request, path: str) -> None:
        self.request = request
        self.path = path
        given = request.headers.get("x-request-id", "")
        self.given_id = given if is_id(given) else ""
        self.request_id = self.given_id or f"req-{secrets.token_hex(8)}"
        self.metadata = _metadata(request.headers)
        self.stream: EventStream | None = None
        self.error_event: Callable[[StatusError], bytes] | None = None

    @property
    def peer(self) -> str:
        """Names the connection."""
        return f"http:{self.request.transport.get_extra_info('peername')}" if self.request.transport else "http:"

    def deadline(self, *, is_stream: bool) -> Deadline:
        """Return the deadline of the client. Raises StatusError for an invalid one.

        A client that does not stream reads only once, so the limit between two reads is its limit for the whole answer.
        """
        total = self._seconds(_TOTAL_TIMEOUT, 1e-3)
        between_reads = self._seconds(_READ_TIMEOUT, 1.0)
        if is_stream:
            return Deadline(total, between_reads)
        given = [seconds for seconds in (total, between_reads) if seconds is not None]
        return Deadline(min(given) if given else None)

    async def read_json(self, account: CallAccount, max_bytes: int) -> JsonObject:
        """Return the body. Raises StatusError."""
        request = self.request
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HttpError(415, "content-encoding: must be absent: bodies are read as they are")
        if request.content_type != "application/json":
            # Browsers send any other type to any server without asking it first.
            raise HttpError(415, f"content-type: must be application/json, got {request.content_type[:64]}")
        if (request.content_length or 0) > max_bytes:
            raise _too_large(max_bytes)
        data = bytearray()
        try:
            async with account.reading():
                async for chunk in request.content.iter_any():
                    if len(data) + len(chunk) > max_bytes:
                        raise _too_large(max_bytes)
                    account.hold(len(chunk))
                    data += chunk
        except StatusError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise HttpError(408, error.message, error.code) from None
            raise
        except (asyncio.IncompleteReadError, web.RequestPayloadError):
            raise HttpError(400, "body: ends before it is complete") from None
        return parse_object(bytes(data))

    def _seconds(self, header: str, unit: float) -> float | None:
        text = self.request.headers.get(header)
        if text is None:
            return None
        try:
            seconds = float(text) * unit
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise StatusError.invalid(header, "must be a number above 0")
        return min(seconds, _LONGEST_TIMEOUT)


def _metadata(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    found = [(name, headers[name]) for name in ("authorization", "traceparent", "tracestate") if name in headers]
    if "authorization" not in headers and "x-api-key" in headers:  # Anthropic's clients
        found.append(("authorization", f"Bearer {headers['x-api-key']}"))
    return tuple(found)


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"body: must have at most {max_bytes} bytes", grpc.StatusCode.RESOURCE_EXHAUSTED)
