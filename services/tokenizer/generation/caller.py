"""The caller of a generation, independent of the protocol."""

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
        method: Name of the method, for spans.
        span_attributes: Attributes of the call's span that OpenTelemetry defines for the protocol.
        metadata: Headers, names in lower case: `traceparent` and `tracestate` are read.
    """

    transport: str
    method: str
    span_attributes: Mapping[str, str]
    metadata: Iterable[tuple[str, str | bytes]]

    @abstractmethod
    def time_remaining(self) -> float | None:
        """Return the seconds until the client's deadline, 0 or less once it has passed; None: no deadline.

        The protocol's server has to cancel the call's task at the deadline, as when the client leaves.
        """

    def trace_headers(self) -> TraceHeaders:
        """The trace that the call is a part of."""
        return TraceHeaders.from_metadata(self.metadata)

    def abort_reason(self) -> link_pb2.AbortReason:
        """Return the reason for aborting the request if its call were cancelled now: the deadline, or the client."""
        time_remaining = self.time_remaining()
        if time_remaining is not None and time_remaining <= 0:
            return link_pb2.ABORT_REASON_DEADLINE
        return link_pb2.ABORT_REASON_CANCELLED

    def cancellation(self) -> StatusError:
        """Return the status of a call that is cancelled now."""
        if self.abort_reason() == link_pb2.ABORT_REASON_DEADLINE:
            return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        return StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")
