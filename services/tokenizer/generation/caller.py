"""The caller of a generation, as far as it does not matter by which protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.tracing import TraceHeaders
from scalellm.v1 import link_pb2


class Caller(ABC):
    """One call of a client. Each protocol has its own.

    Attributes:
        transport: Name of the protocol in metrics: grpc or http.
        method: Name of the method, as spans have it.
        span_attributes: Attributes of the call's span: what OpenTelemetry wants to know of the protocol.
        metadata: Headers, names in lower case: `traceparent` and `tracestate` are read.
    """

    transport: str
    method: str
    span_attributes: Mapping[str, str]
    metadata: Iterable[tuple[str, str | bytes]]

    @abstractmethod
    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline, 0 or less once it has passed. None: it waits for ever.

        Whoever serves the call has to cancel its task at the deadline, as when the client leaves.
        """

    def trace_headers(self) -> TraceHeaders:
        """The trace that the call is a part of."""
        return TraceHeaders.from_metadata(self.metadata)

    def abort_reason(self) -> link_pb2.AbortReason:
        """Return the reason of a request that was cancelled now."""
        time_remaining = self.time_remaining()
        if time_remaining is not None and time_remaining <= 0:
            return link_pb2.ABORT_REASON_DEADLINE
        return link_pb2.ABORT_REASON_CANCELLED

    def cancellation(self) -> StatusError:
        """The status of a call that was cancelled now."""
        if self.abort_reason() == link_pb2.ABORT_REASON_DEADLINE:
            return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        return StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")
