"""Spans on OpenTelemetry's SDK, with monotonic times and gRPC statuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from scalellm import __version__
from scalellm.services.common.tracing.clock import WallClock
from scalellm.services.common.tracing.export import BoundedProcessor, file_exporter, otlp_exporter
from scalellm.services.common.tracing.headers import TraceHeaders

if TYPE_CHECKING:
    from scalellm.services.common.settings import ServiceSettings

Attributes = Mapping[str, AttributeValue]
Kind = Literal["server", "client", "internal"]

_KINDS = {
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "internal": trace.SpanKind.INTERNAL,
}
_FLUSH_LIMIT = 2.0
"""Most seconds for the export of the last spans at the end of the process."""

# OpenTelemetry's conventions for gRPC: on a server these codes are its failures; the others are answers to the client.
_SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class Tracer:
    """Begins spans, and exports those that have ended, in the background.

    If the exporter falls behind, spans are dropped, so a dead collector costs memory for a few thousand spans, but no
    time.

    Args:
        service: Name of the service.
        settings: Settings that name the exporter.
        sample_ratio: Share of traced requests, of those that come without a traceparent.
    """

    def __init__(self, service: str, settings: ServiceSettings, sample_ratio: float) -> None:
        resource: dict[str, AttributeValue] = {
            "service.namespace": "scalellm",
            "service.name": f"scalellm-{service}",
            "service.version": __version__,
            "process.pid": os.getpid(),
        }
        exporters = []
        if settings.trace_file is not None:
            exporters.append(file_exporter(settings.trace_file))
        if settings.otlp_endpoint is not None:
            exporters.append(otlp_exporter(settings.otlp_endpoint))
        self._processors = tuple(map(BoundedProcessor, exporters))
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(dict(resource)),
            shutdown_on_exit=False,
        )
        for processor in self._processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("scalellm", __version__)
        self._clock = WallClock()
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, name: str, headers: TraceHeaders, at: int, *, kind: Kind = "server", attributes: Attributes | None = None
    ) -> Span | None:
        """Begin the topmost span of this process for a request. Returns None if the request is not traced.

        Args:
            name: Name of the span.
            headers: Headers of the request.
            at: Time of the request's arrival, in monotonic nanoseconds.
            kind: Kind of the span.
            attributes: Attributes of the span.
        """
        parent = self._propagator.extract(headers._asdict(), Context())
        offset = self._clock.offset()
        span = self._tracer.start_span(name, parent, _KINDS[kind], attributes, start_time=at + offset)
        return Span(self, span, offset) if span.is_recording() else None

    def begin_child(self, parent: Span, name: str, at: int, kind: Kind, attributes: Attributes | None) -> Span:
        """Begin a span under another one."""
        context = trace.set_span_in_context(parent.span, Context())
        span = self._tracer.start_span(name, context, _KINDS[kind], attributes, start_time=at + parent.offset)
        return Span(self, span, parent.offset)

    def headers(self, span: Span) -> TraceHeaders:
        """Return the headers by which other services make their spans children of this one."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span.span, Context()))
        return TraceHeaders(**carrier)

    @property
    def num_refused(self) -> int:
        """Number of spans that were lost because the queue was full."""
        return sum(processor.num_refused for processor in self._processors)

    @property
    def num_failed(self) -> int:
        """Number of spans whose export failed."""
        return sum(processor.exporter.num_failed for processor in self._processors)

    def close(self) -> None:
        """Export the remaining spans, within a few seconds."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_LIMIT)
        if flushing.is_alive():
            for processor in self._processors:
                processor.exporter.shutdown()


class Span:
    """A recorded span. All times are monotonic nanoseconds of this host.

    Args:
        tracer: The tracer that made it.
        span: OpenTelemetry's span.
        offset: Nanoseconds to add to monotonic times to get Unix times.
    """

    def __init__(self, tracer: Tracer, span: trace.Span, offset: int) -> None:
        self._tracer = tracer
        self.span = span
        self.offset = offset
        self._is_server = getattr(span, "kind", None) is trace.SpanKind.SERVER

    @property
    def headers(self) -> TraceHeaders:
        """Headers to send along with a request that belongs under this span."""
        return self._tracer.headers(self)

    def begin(self, name: str, at: int, *, kind: Kind = "internal", attributes: Attributes | None = None) -> Span:
        """Begin a span under this one."""
        return self._tracer.begin_child(self, name, at, kind, attributes)

    def add(self, name: str, start: int, end: int, attributes: Attributes | None = None) -> None:
        """Record a child span that has ended."""
        self.begin(name, start, attributes=attributes).end(end)

    def event(self, name: str, at: int, attributes: Attributes | None = None) -> None:
        """Record an event at a moment."""
        self.span.add_event(name, attributes, timestamp=at + self.offset)

    def set(self, attributes: Attributes) -> None:
        """Set attributes."""
        self.span.set_attributes(attributes)

    def end(self, at: int, code: grpc.StatusCode | None = None, message: str = "") -> None:
        """End the span.

        Args:
            at: Time, in monotonic nanoseconds.
            code: Status of its request; None = the span does not belong to a request.
            message: The reason, unless the code is OK.
        """
        if code is not None:
            self.span.set_attribute("rpc.response.status_code", code.name)
            failed = code in _SERVER_ERRORS if self._is_server else code is not grpc.StatusCode.OK
            if failed:
                self.span.set_attribute("error.type", code.name)
                self.span.set_status(trace.StatusCode.ERROR, message)
        self.span.end(at + self.offset)
