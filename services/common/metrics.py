"""The Prometheus endpoint of a service, and the metrics that all services have.

The endpoint answers in a thread of its own. Rendering competes with the event loop for the interpreter lock, so the
thread releases it after every metric: the loop waits for tens of microseconds, not for a whole scrape.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import psutil
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scalellm import __version__
from scalellm.services.common.addresses import join_address
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.metrics_server import MetricsServer
from scalellm.services.common.tls import PLAINTEXT, TlsFiles

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer

_LAG_INTERVAL = 0.5


class MetricsEndpoint:
    """Serves a service's collectors over HTTP, with the build and the processes.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        service: Name of the service.
        collectors: Collectors of its metrics.
        processes: Returns the pids of the service's other processes, by their kind. Called at each scrape.
        tls: TLS files of the endpoint.
        tracer: The process's tracer, if traces are on, whose lost spans are reported.

    Raises StartError.
    """

    def __init__(
        self,
        host: str,
        port: int,
        service: str,
        collectors: Iterable[Collector],
        processes: Callable[[], Mapping[str, int]] = dict,
        tls: TlsFiles = PLAINTEXT,
        tracer: Tracer | None = None,
    ) -> None:
        lost = () if tracer is None else (DroppedSpansCollector(tracer),)
        registry = make_registry(service, (_ProcessesCollector(processes), *collectors, *lost))
        ProcessCollector(registry=registry)
        try:
            self._server = MetricsServer(host, port, registry, tls)
        except OSError as error:
            where = join_address(host, port)
            raise StartError(
                f"cannot listen on {where} for metrics: {error.strerror}; choose another --metrics-port"
            ) from None
        self.address = self._server.address

    def stop(self) -> None:
        """Close the port."""
        self._server.stop()


def make_registry(service: str, collectors: Iterable[Collector]) -> CollectorRegistry:
    """Return a registry of the collectors and the build, for rendering in a thread beside an event loop."""
    registry = _PoliteRegistry()
    for collector in (_BuildCollector(service), *collectors):
        registry.register(collector)
    return registry


class LoopLag:
    """Measures the delay with which an event loop runs due callbacks, which adds to the latency of every request.

    Args:
        observe: Receives each measurement, in seconds.
        interval: Seconds between two measurements.
    """

    def __init__(self, observe: Callable[[float], None], interval: float = _LAG_INTERVAL) -> None:
        self._observe = observe
        self._interval = interval

    async def run(self) -> None:
        """Measure until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + self._interval
            await asyncio.sleep(self._interval)
            self._observe(max(0.0, now() - due))


FamilyT = TypeVar("FamilyT", CounterMetricFamily, GaugeMetricFamily)


def filled(family: FamilyT, values: Iterable[tuple[Sequence[str], float]]) -> FamilyT:
    """Add samples to a metric with labels: the values of the labels, and the sample's."""
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def histogram_metric(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    """Render a histogram whose `counts`, one more than there are `bounds`, are not cumulative."""
    buckets, count = [], 0
    for bound, more in zip((*map(str, map(float, bounds)), "+Inf"), counts, strict=True):
        count += more
        buckets.append((bound, count))
    family = HistogramMetricFamily(name, text)
    family.add_metric((), buckets, total)
    return family


DROPPED_SPANS = ("scalellm_trace_spans_dropped", "Spans of traces that were lost.", ("reason",))
"""Name, text and labels of the counter of lost spans, which exists while traces are on."""

QUEUE_FULL, EXPORT_FAILED = "queue_full", "export_failed"
"""Reasons of lost spans: the queue was full, or the export failed."""


class _PoliteRegistry(CollectorRegistry):
    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, releasing the interpreter lock in between."""
        for metric in super().collect():
            yield metric
            time.sleep(0)


class _BuildCollector(Collector):
    def __init__(self, service: str) -> None:
        self._labels = {"service": service, "version": __version__, "python": platform.python_version()}

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with the build's version."""
        build = GaugeMetricFamily("scalellm_build_info", "What runs here; always 1.", labels=tuple(self._labels))
        yield filled(build, [(tuple(self._labels.values()), 1.0)])


class _ProcessesCollector(Collector):
    """CPU time and memory of every process of the service. prometheus_client's ProcessCollector has only its own
    process.
    """

    def __init__(self, others: Callable[[], Mapping[str, int]]) -> None:
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, with one sample per running process."""
        cpu, memory, files = [], [], []
        for name, pid in {"main": os.getpid(), **self._others()}.items():
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    cpu.append(((name,), times.user + times.system))
                    memory.append(((name,), float(process.memory_info().rss)))
                    files.append(((name,), float(process.num_fds())))
            except psutil.Error:  # it has just ended
                continue
        labels = ("process",)
        prefix = "scalellm_process"
        yield filled(CounterMetricFamily(f"{prefix}_cpu_seconds", "User and system time.", labels=labels), cpu)
        yield filled(GaugeMetricFamily(f"{prefix}_resident_memory_bytes", "Memory in RAM.", labels=labels), memory)
        yield filled(GaugeMetricFamily(f"{prefix}_open_fds", "Open files and sockets.", labels=labels), files)


class DroppedSpansCollector(Collector):
    """Spans that a process lost."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def collect(self) -> Iterator[Metric]:
        """Yield the counter of lost spans."""
        name, text, labels = DROPPED_SPANS
        values = [((QUEUE_FULL,), self._tracer.num_refused), ((EXPORT_FAILED,), self._tracer.num_failed)]
        yield filled(CounterMetricFamily(name, text, labels=labels), values)
