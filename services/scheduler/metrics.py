"""The scheduler's Prometheus metrics: one snapshot per scrape, so that its numbers add up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scalellm.services.common.access import Access
from scalellm.services.common.errors import code_name
from scalellm.services.common.histogram import Histogram
from scalellm.services.common.link import LinkTraffic
from scalellm.services.common.metrics import filled, histogram_metric
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.books import Books, outcome_of
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.scaling import ALL, PoolState, Scaling
from scalellm.v1 import scheduler_pb2

_PREFIX = "scalellm_scheduler"
_PHASES = {
    scheduler_pb2.EXECUTOR_PHASE_CONNECTING: "connecting",
    scheduler_pb2.EXECUTOR_PHASE_READY: "ready",
    scheduler_pb2.EXECUTOR_PHASE_DRAINING: "draining",
    scheduler_pb2.EXECUTOR_PHASE_INCOMPATIBLE: "incompatible",
}
_SCRAPE_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The scheduler's state between two callbacks of its event loop, when the counts add up."""

    state: scheduler_pb2.GetStateResponse
    books: Books
    traffic: dict[str, LinkTraffic]
    redis_failures: int | None
    keys_unread: bool
    num_client_links: int
    num_pool_switches: int
    scaling: Mapping[str, PoolState]
    num_tasks: int


class SchedulerCollector(Collector):
    """Renders the scheduler's state.

    Scrapes come on a thread of their own; the event loop only takes the snapshot.

    Args:
        loop: The scheduler's event loop.
        get_state: Returns the answer to GetState.
        dispatchers: One for each model.
        scaling: Source of the wanted numbers of executors.
        affinity: Source of the state of Redis.
        access: Source of the state of the API keys.
        loop_lag: Lag of the event loop.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        get_state: Callable[[], scheduler_pb2.GetStateResponse],
        dispatchers: Dispatchers,
        scaling: Scaling,
        affinity: AffinityStore,
        access: Access,
        loop_lag: Histogram,
    ) -> None:
        self._loop = loop
        self._get_state = get_state
        self._dispatchers = dispatchers
        self._scaling = scaling
        self._affinity = affinity
        self._access = access
        self._loop_lag = loop_lag

    def describe(self) -> list[Metric]:
        """Return nothing. Without this, the registry would collect while the event loop, which has to answer,
        registers.
        """
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one scrape."""
        taken: concurrent.futures.Future[_Snapshot] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(lambda: taken.set_result(self._take()))
        snapshot = taken.result(_SCRAPE_LIMIT)
        yield from _requests(snapshot)
        yield from _models(snapshot)
        yield from _tokens(snapshot.books)
        yield from _executors(snapshot)
        yield from _pools(snapshot)
        yield from _scaling(snapshot)
        yield from _links(snapshot)
        if snapshot.redis_failures is not None:
            up = float(snapshot.state.redis_ok)
            yield GaugeMetricFamily(f"{_PREFIX}_redis_up", "Whether Redis does what it is asked.", value=up)
            failures = snapshot.redis_failures
            yield CounterMetricFamily(f"{_PREFIX}_redis_failures", "Operations that Redis did not do.", failures)
        unread = float(snapshot.keys_unread)
        yield GaugeMetricFamily(f"{_PREFIX}_keys_unread", "Whether API keys or link token cannot be read.", unread)
        draining = float(snapshot.state.draining)
        yield GaugeMetricFamily(f"{_PREFIX}_draining", "Whether nothing is admitted.", value=draining)
        # A leak of requests would show first as a growing number of tasks.
        yield GaugeMetricFamily(f"{_PREFIX}_asyncio_tasks", "Tasks of the event loop.", value=snapshot.num_tasks)
        yield _histogram("event_loop_lag_seconds", "How late the event loop ran what was due.", self._loop_lag)

    def _take(self) -> _Snapshot:
        dispatchers = self._dispatchers
        return _Snapshot(
            state=self._get_state(),
            books=Books.total(dispatcher.placement.books for dispatcher in dispatchers),
            traffic={address: replace(replica.traffic) for address, replica in dispatchers.replicas.items()},
            redis_failures=self._affinity.num_failures if self._affinity.has_redis else None,
            keys_unread=self._access.is_failing,
            num_client_links=dispatchers.num_client_links,
            num_pool_switches=sum(dispatcher.fleet.pools.num_switches for dispatcher in dispatchers),
            scaling=self._scaling.states,
            num_tasks=len(asyncio.all_tasks()),
        )


def _requests(snapshot: _Snapshot) -> Iterator[Metric]:
    state, books = snapshot.state, snapshot.books
    yield CounterMetricFamily(f"{_PREFIX}_requests_accepted", "Submits that came.", value=state.accepted)
    ended = CounterMetricFamily(f"{_PREFIX}_requests", "Requests that ended.", labels=("outcome", "code"))
    yield filled(ended, [((outcome_of(code), code_name(code)), count) for code, count in books.ended.items()])
    yield CounterMetricFamily(f"{_PREFIX}_dispatches", "Submits sent to executors.", value=books.dispatched)
    yield CounterMetricFamily(f"{_PREFIX}_resubmits", "Requests moved from executors.", value=state.resubmitted)
    text = "Requests taken back so that another tenant got a row."
    yield CounterMetricFamily(f"{_PREFIX}_recalls", text, value=books.recalled)
    yield GaugeMetricFamily(f"{_PREFIX}_num_requests_waiting", "Requests in the queue.", value=state.queued)
    yield GaugeMetricFamily(f"{_PREFIX}_num_tokens_waiting", "Their prompt tokens.", value=state.queued_tokens)
    yield GaugeMetricFamily(f"{_PREFIX}_num_requests_running", "Requests on executors.", value=state.running)
    yield _histogram("queue_time_seconds", "Time in the admission queue.", books.queue_time)


def _models(snapshot: _Snapshot) -> Iterator[Metric]:
    models = snapshot.state.models
    for name, text, field in (
        ("requests_waiting", "Requests in the queue of a model.", "queued"),
        ("requests_running", "Requests on executors of a model.", "running"),
        ("executors", "Executors of a model that take requests.", "ready_executors"),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_model_{name}", text, labels=("model_name",))
        yield filled(family, [((model.model,), getattr(model, field)) for model in models])


def _tokens(books: Books) -> Iterator[Metric]:
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens of the requests that came.", books.prompt_tokens),
        ("tokens_received", "Tokens that came from executors.", books.tokens_received),
        ("tokens_sent", "Of these, tokens sent on to the edge.", books.tokens_sent),
        ("tokens_dropped", "The others: of requests that had ended here, or known already.", books.tokens_dropped),
    ):
        yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _executors(snapshot: _Snapshot) -> Iterator[Metric]:
    executors = snapshot.state.executors
    phases = Counter(executor.phase for executor in executors)
    known = GaugeMetricFamily(f"{_PREFIX}_executors", "Known executors.", labels=("phase",))
    yield filled(known, [((name,), phases[phase]) for phase, name in _PHASES.items()])
    for name, text, field in (
        ("running", "Requests of this scheduler on the executor.", "running"),
        ("credit_requests", "Requests that it would take now.", "credit_requests"),
        ("credit_tokens", "Prompt tokens that it would take now.", "credit_tokens"),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_executor_{name}", text, labels=("executor",))
        yield filled(family, [((executor.address,), getattr(executor, field)) for executor in executors])


def _pools(snapshot: _Snapshot) -> Iterator[Metric]:
    pools = [((str(pool.tensor_parallel), pool.model), pool) for pool in snapshot.state.pools]
    for name, text, value in (
        ("executors", "Ready executors, by the devices that compute a token together.", lambda pool: pool.executors),
        ("running", "Requests of this scheduler on these executors.", lambda pool: pool.running),
        ("chosen", "Whether new requests go there.", lambda pool: float(pool.chosen)),
        ("predicted_seconds", "Predicted time of a request if all were there.", _predicted),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_pool_{name}", text, labels=("tensor_parallel", "model_name"))
        yield filled(family, [(labels, value(pool)) for labels, pool in pools])
    text = "How often new requests went to other executors from then on."
    yield CounterMetricFamily(f"{_PREFIX}_pool_switches", text, value=snapshot.num_pool_switches)


def _predicted(pool: scheduler_pb2.PoolState) -> float:
    seconds: float = pool.predicted_s if pool.HasField("predicted_s") else math.nan
    return seconds


def _scaling(snapshot: _Snapshot) -> Iterator[Metric]:
    pools = [((name or "all",), pool) for name, pool in snapshot.scaling.items()]
    for name, text, field in (
        ("saturation", "Share of their rows or cache that what runs or waits would take.", "saturation"),
        ("wanted_executors", "Executors that there should be.", "wanted"),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=("executors",))
        yield filled(family, [(labels, getattr(pool, field)) for labels, pool in pools])
    text = "Seconds that the oldest request has waited."
    yield GaugeMetricFamily(f"{_PREFIX}_oldest_request_seconds", text, value=snapshot.scaling[ALL].oldest_s)


def _links(snapshot: _Snapshot) -> Iterator[Metric]:
    traffic = [(("tokenizer", ""), snapshot.books.client_traffic)]
    traffic += [(("executor", address), passed) for address, passed in snapshot.traffic.items()]
    links = GaugeMetricFamily(f"{_PREFIX}_links", "Links that stand.", labels=("peer",))
    executors_up = sum(bool(executor.instance_id) for executor in snapshot.state.executors)
    yield filled(links, [(("tokenizer",), snapshot.num_client_links), (("executor",), executors_up)])
    labels = ("peer", "executor", "direction")
    for name, text, sent, received in (
        ("link_frames", "Messages on links; all those of tokenizers together.", "frames_sent", "frames_received"),
        ("link_bytes", "Their bytes.", "bytes_sent", "bytes_received"),
    ):
        family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=labels)
        for peer, passed in traffic:
            filled(family, [((*peer, "sent"), getattr(passed, sent)), ((*peer, "received"), getattr(passed, received))])
        yield family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return histogram_metric(f"{_PREFIX}_{name}", text, histogram.bounds, histogram.counts, histogram.total)
