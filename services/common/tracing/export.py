"""Export of spans to an OTLP collector or a file, in a thread of its own, so that no request waits for it."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from scalellm.services.common.lifecycle import StartError

_log = logging.getLogger(__name__)

_EXPORT_LIMIT = 5.0
"""Most seconds for the export of one batch, retries and pauses included."""

_QUEUE_SPANS = 8192
_EXPORT_DELAY_MS = 1000.0

_IDS = ("traceId", "spanId", "parentSpanId")


class FileExporter(SpanExporter):
    """Appends to a file: one ExportTraceServiceRequest in OTLP's JSON per line, as collectors and viewers read it.

    A line is written at once and at the end of the file, so several processes may share one.

    Args:
        path: The file. Raises StartError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise StartError(f"cannot write {path}: {error.strerror}; choose another --trace-file") from None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the spans as one line."""
        request = MessageToDict(encode_spans(spans), use_integers_for_enums=True)
        for resource in request["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    _spell_ids(span)
        line = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        return SpanExportResult.SUCCESS if os.write(self._file, line) == len(line) else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Close the file."""
        os.close(self._file)


def _spell_ids(span: dict[str, Any]) -> None:
    """Convert a span's ids to hexadecimal for OTLP's JSON; protobuf's JSON has them in base64."""
    for name in _IDS:
        if name in span:
            span[name] = base64.b64decode(span[name]).hex()


class ReportingExporter(SpanExporter):
    """Logs once that spans cannot be exported, and once that they can be again, with the number of lost ones.

    Args:
        exporter: The exporter.
        target: Name of the exporter's target.

    Attributes:
        num_taken: Number of spans that were passed to the exporter.
        num_failed: Number of spans whose export failed.
    """

    def __init__(self, exporter: SpanExporter, target: str) -> None:
        self._exporter = exporter
        self._target = target
        self._lost = 0
        self._closed = False
        self.num_taken = 0
        self.num_failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch. If that fails its spans are lost."""
        self.num_taken += len(spans)
        try:
            result, why = self._exporter.export(spans), "no collector takes them there"
        except OSError as error:
            result, why = SpanExportResult.FAILURE, error.strerror or type(error).__name__
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                _log.info("traces are exported to %s again, %d spans were lost", self._target, self._lost)
            self._lost = 0
        else:
            if not self._lost:
                _log.warning("traces cannot be exported to %s and are lost: %s", self._target, why)
            self._lost += len(spans)
            self.num_failed += len(spans)
        return result

    def shutdown(self) -> None:
        """End the export in progress."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()


class BoundedProcessor(BatchSpanProcessor):
    """Queues spans for the export, and counts those for which the queue has no room; OpenTelemetry only logs these.

    Args:
        exporter: Exports the spans, in a thread of its own.

    Attributes:
        num_refused: Number of spans for which there was no room. Changed only by the thread of the event loop.
    """

    def __init__(self, exporter: ReportingExporter) -> None:
        super().__init__(exporter, max_queue_size=_QUEUE_SPANS, schedule_delay_millis=_EXPORT_DELAY_MS)
        self.exporter = exporter
        self.num_refused = 0
        self._num_kept = 0

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that ended."""
        if self._num_kept - self.exporter.num_taken >= _QUEUE_SPANS:
            if not self.num_refused:
                _log.warning("traces come faster than they are exported; spans that find no room are lost")
            self.num_refused += 1
            return
        self._num_kept += 1
        super().on_end(span)


def otlp_exporter(endpoint: str) -> ReportingExporter:
    """Make an exporter to a collector, by OTLP/gRPC. Headers, certificates and compression come from
    OTEL_EXPORTER_OTLP_*.
    """
    # OpenTelemetry would log every attempt; ReportingExporter logs changes instead.
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").setLevel(logging.CRITICAL)
    return ReportingExporter(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_LIMIT), endpoint)


def file_exporter(path: Path) -> ReportingExporter:
    """Make an exporter to a file. Raises StartError."""
    return ReportingExporter(FileExporter(path), str(path))
