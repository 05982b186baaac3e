"""The edge's metrics. Names follow vLLM's, with our prefix.

Each worker writes its values to memory-mapped files (prometheus_client's multiprocess mode); the parent's endpoint adds
them up. An update costs one or two microseconds.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from scalellm.v1 import common_pb2

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0)

_PREFIX = "scalellm_tokenizer_requests"
_ACCEPTED, _ENDED, _RUNNING = f"{_PREFIX}_accepted", f"{_PREFIX}_ended", f"{_PREFIX}_running"


_MAX_GAPS = 1000
"""Messages after which `flush` is not waited for."""


class Outcome(enum.StrEnum):
    """How a Generate call ended."""

    FINISHED = "finished"
    """OK."""
    CANCELLED = "cancelled"
    """The client left, or its deadline passed."""
    REJECTED = "rejected"
    """Any other status."""


class EdgeMetrics:
    """What one worker counts. `requests_running` is derived from the counters, see WorkersCollector."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labelnames=labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"scalellm_{name}", text, buckets=buckets, registry=registry)

        self.accepted = counter(_ACCEPTED, "Generate calls that came.")
        ended = counter(_ENDED, "Generate calls that ended.", ("outcome",))
        self.ended = {outcome: ended.labels(outcome.value) for outcome in Outcome}
        success = counter("scalellm_request_success", "Samples that ended well.", ("finished_reason",))
        self.success = {
            common_pb2.FINISH_REASON_STOP: success.labels("stop"),
            common_pb2.FINISH_REASON_LENGTH: success.labels("length"),
        }
        self.prompt_tokens = counter("scalellm_prompt_tokens", "Prompt tokens of requests that finished.")
        self.generation_tokens = counter("scalellm_generation_tokens", "Tokens received from the executors.")
        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "Between messages with tokens of one sample.", _ITL_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _E2E_BUCKETS)
        self.link_up = Gauge(
            "scalellm_tokenizer_scheduler_links",
            "Workers whose link to the scheduler is up.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.tasks = Gauge(
            "scalellm_tokenizer_asyncio_tasks",
            "Tasks of the workers' event loops: a leak of requests would show here first.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._gaps: list[float] = []
        self._tokens = 0

    def observe_message(self, num_tokens: int, gap: float) -> None:
        """A message with tokens goes out, `gap` seconds after the sample's last one; counted at the next flush."""
        self._tokens += num_tokens
        self._gaps.append(gap)
        if len(self._gaps) >= _MAX_GAPS:
            self.flush()

    def flush(self) -> None:
        """Count what was observed: in one go it costs a third of what it costs between messages."""
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            self.itl.observe(gap)
        self.generation_tokens.inc(self._tokens)
        self._tokens = 0


class WorkersCollector(Collector):
    """Adds up the workers' files, and closes the books of workers that crashed.

    The running requests are what was accepted and has not ended, taken from one reading of the files, so that
    accepted = finished + cancelled + rejected + running holds at every scrape.

    Args:
        folder: Where the workers write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lost = 0.0
        self._crashes = 0

    def collect(self) -> list[Metric]:
        """All metrics, from one reading."""
        metrics = self._read(sorted(self._folder.glob("*.db")))
        running = _running(metrics) - self._lost
        if _ENDED in metrics:
            ended = metrics[_ENDED]
            ended.samples = [
                sample._replace(value=sample.value + self._lost)
                if sample.labels["outcome"] == Outcome.REJECTED
                else sample
                for sample in ended.samples
            ]
        return [
            *metrics.values(),
            GaugeMetricFamily(_RUNNING, "Generate calls that run.", value=running),
            CounterMetricFamily(
                "scalellm_tokenizer_worker_crashes", "Workers that ended on their own.", value=self._crashes
            ),
        ]

    def on_worker_crash(self, pid: int) -> None:
        """The calls that a worker was serving when it died ended with it: count them as rejected."""
        mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]
        self._crashes += 1
        self._lost += _running(self._read(sorted(self._folder.glob(f"counter_{pid}.db"))))

    @staticmethod
    def _read(files: Sequence[Path]) -> dict[str, Metric]:
        merged: Iterable[Metric] = MultiProcessCollector.merge([str(file) for file in files])  # type: ignore[no-untyped-call]
        return {metric.name: metric for metric in merged}


def _running(metrics: Mapping[str, Metric]) -> float:
    def total(name: str) -> float:
        return sum(sample.value for sample in metrics[name].samples) if name in metrics else 0.0

    return total(_ACCEPTED) - total(_ENDED)
