"""Spans as a collector gets them: read from a trace file, or received by OTLP/gRPC."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

SERVER, CLIENT = 2, 3


@dataclass(frozen=True)
class SpanRecord:
    """One exported span; times in Unix nanoseconds, `status` is OTLP's code (2 = error)."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    end: int
    status: int
    attributes: dict[str, Any]
    events: dict[str, int]
    event_attributes: list[tuple[str, dict[str, Any]]]
    trace_state: str


def _value(value: dict[str, Any]) -> Any:
    ((kind, content),) = value.items()
    if kind == "arrayValue":
        return [_value(item) for item in content.get("values", [])]
    return int(content) if kind == "intValue" else content


def _attributes(pairs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {pair["key"]: _value(pair["value"]) for pair in pairs}


def read_trace_file(path: Path) -> list[SpanRecord]:
    """All spans of a file; every line must be a whole request, but the last one may still be on its way."""
    *lines, _ = path.read_text().split("\n")
    return [span for line in lines for span in _spans(json.loads(line))]


def _spans(request: dict[str, Any]) -> Iterator[SpanRecord]:
    for resource_spans in request["resourceSpans"]:
        resource = _attributes(resource_spans["resource"]["attributes"])
        for scope in resource_spans["scopeSpans"]:
            yield from (_span(resource["service.name"], span) for span in scope["spans"])


def _span(service: str, span: dict[str, Any]) -> SpanRecord:
    events = span.get("events", [])
    return SpanRecord(
        service=service.removeprefix("scalellm-"),
        name=span["name"],
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        kind=span["kind"],
        start=int(span["startTimeUnixNano"]),
        end=int(span["endTimeUnixNano"]),
        status=span.get("status", {}).get("code", 0),
        attributes=_attributes(span.get("attributes", [])),
        events={event["name"]: int(event["timeUnixNano"]) for event in events},
        event_attributes=[(event["name"], _attributes(event.get("attributes", []))) for event in events],
        trace_state=span.get("traceState", ""),
    )


def by_trace(spans: Iterable[SpanRecord]) -> dict[str, list[SpanRecord]]:
    traces: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)
    return traces


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans by OTLP/gRPC, on a port of its own."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[SpanRecord]:
        """All that came; ids are spelled as protobuf's JSON does."""
        requests = [MessageToDict(request, use_integers_for_enums=True) for request in self.requests]
        return [span for request in requests for span in _spans(request)]

    def stop(self) -> None:
        self._server.stop(0).wait()
