"""The scheduler's spans of one request that is traced."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.tracing import TraceHeaders
from scalellm.v1 import link_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Span, Tracer

_LINK = "scalellm.v1.Executor/Execute"


class RequestTrace:
    """One span from Submit to Finish, and under it one for each wait in the queue and each executor that was tried.

    Args:
        span: The request's.
        submit: The request; its trace headers become those of each executor's span in turn.
        now: Time of arrival, in monotonic nanoseconds.
    """

    def __init__(self, span: Span, submit: link_pb2.Submit, now: int) -> None:
        self._span = span
        self._submit = submit
        self._waits_since = now
        self._attempt: Span | None = None
        self._num_attempts = 0

    @classmethod
    def begin(cls, tracer: Tracer, submit: link_pb2.Submit) -> RequestTrace | None:
        """Begin the trace of a Submit that arrived. Returns None if it is not traced."""
        headers = TraceHeaders(submit.traceparent, submit.tracestate)
        if not headers.is_sampled:
            return None
        now = time.monotonic_ns()
        attributes: dict[str, str | int] = {
            "gen_ai.response.id": submit.request_id,
            "gen_ai.usage.input_tokens": len(submit.token_ids),
        }
        span = tracer.begin("schedule", headers, now, attributes=attributes)
        return cls(span, submit, now) if span is not None else None

    def dispatch(self, address: str) -> None:
        """End the span of the wait and begin that of an executor, which the request is sent to."""
        now = time.monotonic_ns()
        self._span.add("queue", self._waits_since, now)
        self._num_attempts += 1
        self._attempt = self._span.begin(_LINK, now, kind="client", attributes={"server.address": address})
        self._submit.traceparent, self._submit.tracestate = self._attempt.headers

    def come_back(self, error: StatusError) -> None:
        """End the executor's span with an error and begin that of another wait."""
        self._waits_since = time.monotonic_ns()
        self._end_attempt(self._waits_since, error.code, error.message)

    def end(self, finish: link_pb2.Finish) -> None:
        """End all spans with the request's Finish."""
        now = time.monotonic_ns()
        status = finish.status
        code = StatusError.from_link(status).code if status.code else grpc.StatusCode.OK
        if self._attempt is not None:
            self._end_attempt(now, code, status.message)
        else:
            self._span.add("queue", self._waits_since, now)
        self._span.set(
            {
                "scalellm.executors_tried": self._num_attempts,
                "gen_ai.usage.output_tokens": finish.usage.completion_tokens,
            }
        )
        self._span.end(now, code, status.message)

    def _end_attempt(self, now: int, code: grpc.StatusCode, message: str) -> None:
        if self._attempt is not None:
            self._attempt.end(now, code, message)
            self._attempt = None
