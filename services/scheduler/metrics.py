"""The scheduler's Prometheus metrics: one snapshot per scrape, so that its numbers add up."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scalellm.v1 import scheduler_pb2
from services.scheduler.books import QUEUE_TIME_BUCKETS, Books

_PREFIX = "scalellm_scheduler"
_PHASES = {
    scheduler_pb2.EXECUTOR_PHASE_CONNECTING: "connecting",
    scheduler_pb2.EXECUTOR_PHASE_READY: "ready",
    scheduler_pb2.EXECUTOR_PHASE_DRAINING: "draining",
    scheduler_pb2.EXECUTOR_PHASE_INCOMPATIBLE: "incompatible",
}
_SCRAPE_LIMIT = 2.0


class SchedulerCollector(Collector):
    """Renders the scheduler's state.

    Scrapes come on a thread of their own; the event loop takes the snapshot between two of its callbacks, where the
    books are balanced.

    Args:
        loop: The scheduler's event loop.
        get_state: Takes the snapshot.
        books: For the histogram, which GetState does not carry.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        get_state: Callable[[], scheduler_pb2.GetStateResponse],
        books: Books,
    ) -> None:
        self._loop = loop
        self._get_state = get_state
        self._books = books

    @classmethod
    def registry(
        cls,
        loop: asyncio.AbstractEventLoop,
        get_state: Callable[[], scheduler_pb2.GetStateResponse],
        books: Books,
    ) -> CollectorRegistry:
        """A registry with this collector alone."""
        registry = CollectorRegistry()
        registry.register(cls(loop, get_state, books))
        return registry

    def describe(self) -> list[Metric]:
        """Nothing: the registry must not collect while the loop that answers is busy registering."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        snapshot: concurrent.futures.Future[list[Metric]] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(lambda: snapshot.set_result(list(self._render())))
        yield from snapshot.result(_SCRAPE_LIMIT)

    def _render(self) -> Iterator[Metric]:
        state = self._get_state()
        books = self._books
        yield CounterMetricFamily(f"{_PREFIX}_requests_accepted", "Submits that came.", value=state.accepted)
        outcomes = CounterMetricFamily(f"{_PREFIX}_requests", "Requests that ended.", labels=["outcome"])
        outcomes.add_metric(["finished"], state.finished)
        outcomes.add_metric(["cancelled"], state.cancelled)
        outcomes.add_metric(["rejected"], state.rejected)
        yield outcomes
        yield CounterMetricFamily(f"{_PREFIX}_resubmits", "Requests moved from executors.", value=state.resubmitted)
        yield GaugeMetricFamily(f"{_PREFIX}_num_requests_waiting", "Requests in the queue.", value=state.queued)
        yield GaugeMetricFamily(f"{_PREFIX}_num_tokens_waiting", "Their prompt tokens.", value=state.queued_tokens)
        yield GaugeMetricFamily(f"{_PREFIX}_num_requests_running", "Requests on executors.", value=state.running)
        buckets, total = [], 0
        for bound, count in zip((*map(str, QUEUE_TIME_BUCKETS), "+Inf"), books.queue_time_counts, strict=True):
            total += count
            buckets.append((bound, total))
        queue_time = HistogramMetricFamily(f"{_PREFIX}_queue_time_seconds", "Time in the admission queue.")
        queue_time.add_metric([], buckets, books.queue_time_sum)
        yield queue_time
        phases = Counter(executor.phase for executor in state.executors)
        executors = GaugeMetricFamily(f"{_PREFIX}_executors", "Known executors.", labels=["phase"])
        for phase, name in _PHASES.items():
            executors.add_metric([name], phases[phase])
        yield executors
        yield GaugeMetricFamily(f"{_PREFIX}_redis_up", "Whether Redis answers.", value=float(state.redis_ok))
        yield GaugeMetricFamily(f"{_PREFIX}_draining", "Whether nothing is admitted.", value=float(state.draining))
        # A leak of requests would show here first.
        yield GaugeMetricFamily(f"{_PREFIX}_asyncio_tasks", "Tasks of the event loop.", value=len(asyncio.all_tasks()))
