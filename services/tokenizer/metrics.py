"""The edge's metrics. Names follow vLLM's, with our prefix.

Each worker writes its values to memory-mapped files (prometheus_client's multiprocess mode), and the parent's endpoint
adds them up. An update costs one or two microseconds, so events per message are buffered and counted twice a second.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from scalellm.services.common.api_keys import TenantLimits
from scalellm.services.common.histogram import LAG_SECONDS
from scalellm.services.common.metrics import DROPPED_SPANS, EXPORT_FAILED, QUEUE_FULL
from scalellm.services.tokenizer.model_metrics import ModelMetrics
from scalellm.services.tokenizer.running_request import Move

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer

_SCHEDULER = ("scheduler",)
_PREFIX = "scalellm_tokenizer_requests"
_ACCEPTED, _ENDED, _RUNNING = f"{_PREFIX}_accepted", f"{_PREFIX}_ended", f"{_PREFIX}_running"
_LOST = {"outcome": "rejected", "code": "UNAVAILABLE"}
"""Labels of calls whose worker died, by the status that their clients see."""
_TRANSPORTS = ("grpc", "http")


class Outcome(enum.StrEnum):
    """The outcome of a Generate call."""

    FINISHED = "finished"
    """OK."""
    CANCELLED = "cancelled"
    """The client left, or its deadline passed."""
    REJECTED = "rejected"
    """Any other status."""

    @classmethod
    def of(cls, code: grpc.StatusCode) -> Outcome:
        """Return the outcome of a status."""
        if code is grpc.StatusCode.OK:
            return cls.FINISHED
        by_client = code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
        return cls.CANCELLED if by_client else cls.REJECTED


class EdgeMetrics:
    """The counters of one worker. `requests_running` is derived from the counters, see WorkersCollector.

    Args:
        registry: Registry of the metrics.
        model_names: Names of the models that are served.

    Attributes:
        models: The counters of each model, by its name.
    """

    def __init__(self, registry: CollectorRegistry, model_names: Sequence[str]) -> None:
        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labelnames=labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"scalellm_{name}", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, of_workers: Literal["livesum", "livemax"] = "livesum") -> Gauge:
            return Gauge(f"scalellm_tokenizer_{name}", text, multiprocess_mode=of_workers, registry=registry)

        self.models = ModelMetrics.of_each(registry, model_names)
        accepted = counter(_ACCEPTED, "Requests that came.", ("transport",))
        self._accepted = {transport: accepted.labels(transport) for transport in _TRANSPORTS}
        self.submitted = counter(f"{_PREFIX}_submitted", "Of these, those that went to a scheduler.")
        self._sent = counter(f"{_PREFIX}_sent", "Requests sent to each scheduler, the first time or again.", _SCHEDULER)
        resubmitted = counter(
            f"{_PREFIX}_resubmitted", "Requests sent again, as they lost their scheduler.", ("reason",)
        )
        self.resubmitted = {move: resubmitted.labels(move.value) for move in Move}
        ended = counter(_ENDED, "Requests that ended.", ("transport", "outcome", "code"))
        # All series are there from the start: a rate misses the first increment of one that appears with it.
        self._ended = {
            (transport, code): ended.labels(transport, Outcome.of(code).value, code.name)
            for transport in _TRANSPORTS
            for code in grpc.StatusCode
        }
        self._calls = counter("scalellm_tokenizer_calls", "Calls of any method that ended.", ("method", "code"))
        self.refused_calls = counter("scalellm_tokenizer_calls_refused", "Calls not let in: no key, or not theirs.")
        self.discarded_tokens = counter(
            "scalellm_tokenizer_tokens_discarded", "Tokens received for requests that had ended here."
        )
        self.tokenizer_panics = counter(
            "scalellm_tokenizer_panics", "Texts over which the tokenizers library panicked."
        )
        self.tokens_beyond_stop = counter(
            "scalellm_tokenizer_tokens_beyond_stop", "Tokens that executors generated after a stop text."
        )
        self.taken_over = counter(
            f"{_PREFIX}_taken_over", "Kept requests that went on here after their worker was gone."
        )
        self.loop_lag = histogram(
            "tokenizer_event_loop_lag_seconds", "How late the workers' event loops ran what was due.", LAG_SECONDS
        )
        frames = counter("scalellm_tokenizer_link_frames", "Messages on links to schedulers.", ("direction",))
        self.frames_sent, self.frames_received = frames.labels("sent"), frames.labels("received")
        size = counter("scalellm_tokenizer_link_bytes", "Their bytes.", ("direction",))
        self.bytes_sent, self.bytes_received = size.labels("sent"), size.labels("received")
        self.redis_failures = counter("scalellm_tokenizer_redis_failures", "Operations that Redis did not do.")
        limited = counter("scalellm_tokenizer_requests_limited", "Refused for a limit of their tenant.", ("limit",))
        self._limited = {name: limited.labels(name) for name in TenantLimits.model_fields}
        self.limits_unshared = gauge(
            "unshared_limits", "Workers that keep to the tenants' limits on their own, as Redis is away."
        )
        self.keys_unread = gauge("keys_unread", "Workers that cannot read their file of API keys.")
        self.aliases_unread = gauge("aliases_unread", "Workers that cannot read their file of aliases.")
        self.redis_unusable = gauge("redis_unusable", "Workers for which Redis does not do what sessions need.")
        self.call_bytes = gauge("call_bytes", "Bytes of requests and untaken answers that the workers hold.")
        self.largest_call_bytes = gauge(
            "call_bytes_largest", "Of these, what one tenant holds in one worker, at most.", "livemax"
        )
        self.call_bytes_limit = gauge(
            "call_bytes_limit", "What one tenant may hold in one worker; beyond it calls are refused.", "livemax"
        )
        self.links_up = gauge("scheduler_links", "Links of workers to schedulers that take requests.")
        self._on_scheduler = Gauge(
            "scalellm_tokenizer_scheduler_requests",
            "Requests that run on each scheduler.",
            labelnames=_SCHEDULER,
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.waiting = gauge("requests_without_scheduler", "Requests that lost their scheduler and wait for one.")
        self.kept = gauge("kept_running", "Requests that run whether or not their client is there.")
        self.kept_unwritten = gauge(
            "kept_unwritten",
            "Of these, those whose last moments Redis did not take.",
        )
        self.tasks = gauge(
            "asyncio_tasks", "Tasks of the workers' event loops: a leak of requests would show here first."
        )
        self._registry = registry
        self._sent_to: dict[str, tuple[Counter, int]] = {}
        self._followed: dict[Counter, tuple[Callable[[], int], int]] = {}

    def count_accepted(self, transport: str) -> None:
        """Count an accepted request."""
        self._accepted[transport].inc()

    def count_end(self, transport: str, code: grpc.StatusCode) -> None:
        """Count the end of a request."""
        self._ended[transport, code].inc()

    def count_limited(self, limit: str) -> None:
        """Count a request that was refused for a limit of its tenant."""
        self._limited[limit].inc()

    def count_call(self, method: str, code: grpc.StatusCode) -> None:
        """Count the end of an admitted call."""
        self._calls.labels(method, code.name).inc()

    def follow(self, counter: Counter, read: Callable[[], int]) -> None:
        """Set `counter` to the value that `read` returns, at every flush."""
        self._followed[counter] = (read, 0)

    def tell_schedulers(self, num_sent: Mapping[str, int], num_running: Mapping[str, int]) -> None:
        """Set the numbers of requests sent to each scheduler so far, and running there now, by its address."""
        for address, count in num_sent.items():
            sent, last = self._sent_to.get(address) or (self._sent.labels(address), 0)
            sent.inc(count - last)
            self._sent_to[address] = sent, count
        for address, count in num_running.items():
            self._on_scheduler.labels(address).set(count)

    def follow_tracer(self, tracer: Tracer) -> None:
        """Count the tracer's lost spans."""
        name, text, labels = DROPPED_SPANS
        dropped = Counter(name, text, labelnames=labels, registry=self._registry)
        self.follow(dropped.labels(QUEUE_FULL), lambda: tracer.num_refused)
        self.follow(dropped.labels(EXPORT_FAILED), lambda: tracer.num_failed)

    def flush(self) -> None:
        """Count the buffered events. All at once they cost a third of what they would cost between messages."""
        for model in self.models.values():
            model.flush()
        for counter, (read, last) in self._followed.items():
            value = read()
            counter.inc(value - last)
            self._followed[counter] = (read, value)


class WorkersCollector(Collector):
    """Adds up the workers' files, and counts the calls of crashed workers as ended. The latter are kept in a file in
    the same folder, so that every process that reads the folder gets the same values.

    The number of running requests is computed from one reading of the files, as accepted minus ended ones, so that
    accepted = finished + cancelled + rejected + running holds at every scrape.

    Args:
        folder: Folder of the workers' files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._crash_file = folder / "crashes.json"

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering does not collect."""
        return []

    def collect(self) -> list[Metric]:
        """Return all metrics, from one reading of the files."""
        crashes, lost_calls = self._read_crashes()
        metrics = self._read(sorted(self._folder.glob("*.db")))
        running = sum(_running(metrics, transport) - lost_calls[transport] for transport in _TRANSPORTS)
        if _ENDED in metrics:
            lost = {tuple(sorted((_LOST | {"transport": name}).items())): value for name, value in lost_calls.items()}
            ended = metrics[_ENDED]
            ended.samples = [
                sample._replace(value=sample.value + lost.get(tuple(sorted(sample.labels.items())), 0.0))
                for sample in ended.samples
            ]
        return [
            *metrics.values(),
            GaugeMetricFamily(_RUNNING, "Requests that run.", value=running),
            CounterMetricFamily("scalellm_tokenizer_worker_crashes", "Workers that ended on their own.", value=crashes),
        ]

    def on_worker_crash(self, pid: int) -> None:
        """Count the calls that a worker was serving when it died as rejected."""
        mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]
        crashes, lost = self._read_crashes()
        metrics = self._read(sorted(self._folder.glob(f"counter_{pid}.db")))
        for transport in _TRANSPORTS:
            lost[transport] += _running(metrics, transport)
        partial = self._crash_file.with_suffix(".partial")
        partial.write_text(json.dumps([crashes + 1, lost]))
        partial.replace(self._crash_file)

    def _read_crashes(self) -> tuple[int, dict[str, float]]:
        """Return the number of crashed workers, and by transport the calls that ended with them."""
        try:
            crashes, lost = json.loads(self._crash_file.read_text())
        except FileNotFoundError:
            return 0, dict.fromkeys(_TRANSPORTS, 0.0)
        return crashes, lost

    @staticmethod
    def _read(files: Sequence[Path]) -> dict[str, Metric]:
        merged: Iterable[Metric] = MultiProcessCollector.merge([str(file) for file in files])  # type: ignore[no-untyped-call]
        return {metric.name: metric for metric in merged}


def _running(metrics: Mapping[str, Metric], transport: str) -> float:
    def total(name: str) -> float:
        samples = metrics[name].samples if name in metrics else ()
        return sum(sample.value for sample in samples if sample.labels["transport"] == transport)

    return total(_ACCEPTED) - total(_ENDED)
