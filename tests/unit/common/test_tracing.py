"""Headers, clocks and files of traces."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from otlp import read_trace_file
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.metrics import DroppedSpansCollector
from scalellm.services.common.settings import ServiceSettings, load_settings
from scalellm.services.common.tracing import TraceHeaders, open_tracer
from scalellm.services.common.tracing.clock import WallClock
from scalellm.services.scheduler.config import SchedulerSettings
from service_processes import PATIENCE

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_headers_of_a_call() -> None:
    headers = TraceHeaders.from_metadata((("tracestate", "a=1"), ("traceparent", TRACEPARENT), ("tracestate", "b=2")))
    assert headers == (TRACEPARENT, "a=1,b=2")
    assert headers.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert headers.is_sampled
    assert not TraceHeaders(TRACEPARENT[:-2] + "00").is_sampled
    assert not TraceHeaders().is_sampled
    for bad in ("", "00-1-2-01", TRACEPARENT.upper(), TRACEPARENT + "\n", b"00"):
        assert TraceHeaders.from_metadata((("traceparent", bad), ("tracestate", "a=1"))) == ("", "")
    assert TraceHeaders.from_metadata((("traceparent", TRACEPARENT), ("tracestate", "x" * 513))).tracestate == ""
    assert TraceHeaders.from_metadata(None) == ("", "")


def test_dates_follow_a_clock_that_was_set() -> None:
    times = {"wall": 1_000_000_000_000, "monotonic": 5_000}
    clock = WallClock(wall=lambda: times["wall"], monotonic=lambda: times["monotonic"])
    assert clock.offset() == 1_000_000_000_000 - 5_000
    times["wall"] += 400_000  # less than a millisecond: measuring is no better than that
    assert clock.offset() == 1_000_000_000_000 - 5_000
    times["wall"] += 3_600_000_000_000
    assert clock.offset() == times["wall"] - times["monotonic"]


def test_spans_reach_the_file_by_the_end(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with open_tracer("scheduler", ServiceSettings(trace_file=path)) as tracer:
        assert tracer is not None
        assert tracer.begin("schedule", TraceHeaders(), 0) is None  # below the edge nobody begins a trace
        span = tracer.begin("schedule", TraceHeaders(TRACEPARENT), 1_000)
        assert span is not None
        assert span.headers.trace_id == TraceHeaders(TRACEPARENT).trace_id
        span.add("queue", 1_000, 3_000)
        child = span.begin("call", 3_000, kind="client")
        child.end(4_000, grpc.StatusCode.CANCELLED, "the client went away")
        span.end(5_000, grpc.StatusCode.CANCELLED, "the client went away")
    queue, call, whole = read_trace_file(path)
    assert (queue.name, call.name, whole.name) == ("queue", "call", "schedule")
    assert queue.start - whole.start == 0
    assert [s.end - s.start for s in (queue, call, whole)] == [2_000, 1_000, 4_000]
    assert queue.parent_id == call.parent_id == whole.span_id
    # A cancelled call failed for its caller, and is no failure of the server's.
    assert (call.status, whole.status) == (2, 0)


def dropped(collector: DroppedSpansCollector) -> dict[str, float]:
    return {sample.labels["reason"]: sample.value for metric in collector.collect() for sample in metric.samples}


def test_spans_that_are_lost_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes nothing: what waits finds no room after a while, and what was taken is lost."""
    monkeypatch.setattr("scalellm.services.common.tracing.export._QUEUE_SPANS", 1024)
    monkeypatch.setattr("scalellm.services.common.tracing.tracer._FLUSH_LIMIT", PATIENCE)
    taking = threading.Event()

    def write(file: int, line: bytes) -> int:
        taking.wait(PATIENCE)
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_tracer("scheduler", ServiceSettings(trace_file=tmp_path / "traces.jsonl")) as tracer:
        assert tracer is not None
        collector = DroppedSpansCollector(tracer)
        assert dropped(collector) == {"queue_full": 0, "export_failed": 0}
        monkeypatch.setattr("scalellm.services.common.tracing.export.os.write", write)
        for _ in range(3000):
            span = tracer.begin("schedule", TraceHeaders(TRACEPARENT), 1_000)
            assert span is not None
            span.end(2_000, grpc.StatusCode.OK, "")
        lost = dropped(collector)["queue_full"]
        assert lost >= 3000 - 2 * 1024  # at most one batch was taken meanwhile
        taking.set()
    assert dropped(collector) == {"queue_full": lost, "export_failed": 3000 - lost}


def test_off_and_refused() -> None:
    with open_tracer("scheduler", ServiceSettings()) as tracer:
        assert tracer is None
    settings = ServiceSettings(trace_file=Path("/nowhere/at/all"))
    with pytest.raises(StartError, match="--trace-file"), open_tracer("scheduler", settings):
        pass


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "http://127.0.0.1", "grpc://collector:4317"])
def test_an_endpoint_says_how_to_reach_it(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(SchedulerSettings, ["--otlp-endpoint", endpoint])
    assert "must be http://host:port or https://host:port" in capsys.readouterr().err


def test_services_without_traces_do_not_load_an_exporter() -> None:
    # redis loads OpenTelemetry's metrics where they are installed; what makes and exports spans is ours to avoid.
    heavy = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "pythonjsonlogger")
    code = (
        "import sys, scalellm.services.executor.front, scalellm.services.scheduler.server\n"
        "import scalellm.services.tokenizer.worker\n"
        f"found = [name for name in sys.modules if name.startswith({heavy})]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
