"""One measurement: load on, warm up, count for a while, load off."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from bench.services.processes import Neighbour, RedisServer, Service, cpu_seconds, memory_bytes

_BUSY = 0.85
_SETTLE = 0.3
_PATIENCE = 120.0
"""Seconds in which the first token has to come."""


@dataclass(frozen=True)
class Timing:
    """Seconds of warm-up and of counting."""

    warm_up: float
    window: float


FULL = Timing(1.0, 4.0)
QUICK = Timing(0.2, 0.4)


@dataclass(frozen=True)
class Measurement:
    """The results of one load. `counts` are the neighbours': tokens, messages, requests, errors, and others by role."""

    load: Mapping[str, Any]
    """Arguments of the measurement: streams, steps_per_s, prompt_len, ..."""
    seconds: float
    counts: Mapping[str, int]
    latencies: Mapping[str, Mapping[str, float]]
    """Milliseconds: `latency` from the far neighbour to the near one, `request`, `ttft`, `itl`; p50, p99, count."""
    cpu_s: Mapping[str, float]
    """CPU seconds of the service's processes, by role."""
    neighbour_cores: Mapping[str, float]
    """Cores that each neighbour used."""
    memory: int
    """Bytes of all of the service's processes, under load."""
    idle_cores: float
    """Cores of the machine that nobody used."""
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that arrived."""
        return self.counts.get("tokens", 0) / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Requests that ended well."""
        return self.counts.get("requests", 0) / self.seconds

    @property
    def cores(self) -> float:
        """Cores that the service used."""
        return sum(self.cpu_s.values()) / self.seconds

    def cpu_us(self, what: str) -> float:
        """CPU microseconds of the service per token, message or request."""
        return 1e6 * sum(self.cpu_s.values()) / max(1, self.counts.get(what, 0))

    @property
    def bottleneck(self) -> str:
        """The limit of this measurement beside the service; empty when there is none."""
        busy = [role for role, cores in self.neighbour_cores.items() if cores > _BUSY]
        if busy:
            return f"the simulated {' and '.join(busy)}"
        return "the machine's cores" if self.idle_cores < 0.1 else ""

    def as_json(self) -> dict[str, Any]:
        """Return the measurement as plain values."""
        return asdict(self) | {
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "cores": self.cores,
            "bottleneck": self.bottleneck,
        }


class Bench:
    """A service between its neighbours.

    Args:
        services: The measured services: CPU and memory are theirs.
        source: The neighbour that sends the load (clients or edge).
        far: The neighbour behind the service, if it is simulated; it is started first and stopped last.
        redis: The service's Redis: its commands and CPU time are reported per request.
    """

    def __init__(
        self,
        timing: Timing,
        services: Sequence[Service],
        source: Neighbour,
        far: Neighbour | None = None,
        redis: RedisServer | None = None,
    ) -> None:
        self._timing = timing
        self.source = source
        self._far = far
        self._redis = redis
        self._processes = {role: processes for service in services for role, processes in service.processes.items()}

    def measure(self, load: Mapping[str, Any], steps_per_s: float | None = None) -> Measurement:
        """Put a load on, count, take it away.

        Args:
            load: Load for the source.
            steps_per_s: Steps per second of the far neighbour; None without one.
        """
        neighbours = [self.source] if self._far is None else [self.source, self._far]
        if self._far is not None:
            self._far.start(steps_per_s=steps_per_s)
        self.source.start(**load)
        early = self._take(neighbours, self._timing.warm_up)
        psutil.cpu_times_percent()
        redis_before = self._redis.totals() if self._redis is not None else {}
        began, before, theirs_before = time.perf_counter(), self._cpu(), [cpu_seconds(n.process) for n in neighbours]
        reports = self._take(neighbours, self._timing.window)
        seconds = time.perf_counter() - began
        redis_after = self._redis.totals() if self._redis is not None else {}
        after, theirs_after = self._cpu(), [cpu_seconds(n.process) for n in neighbours]
        idle = psutil.cpu_times_percent().idle / 100 * (psutil.cpu_count() or 1)
        memory = sum(memory_bytes(process) for processes in self._processes.values() for process in processes)
        self.source.stop()
        if self._far is not None:
            self._far.stop()
        time.sleep(min(_SETTLE, self._timing.warm_up))
        merged = {name: value for report in reversed(reports) for name, value in report.items()}
        # What failed is not sent again: it counts whenever it was.
        merged["errors"] = sum(report.get("errors", 0) for report in (*early, *reports))
        return Measurement(
            load=dict(load) | ({} if steps_per_s is None else {"steps_per_s": steps_per_s}),
            seconds=seconds,
            counts={name: value for name, value in merged.items() if isinstance(value, int)},
            latencies={name.removesuffix("_ms"): value for name, value in merged.items() if isinstance(value, dict)},
            cpu_s={role: after[role] - before[role] for role in after},
            neighbour_cores={
                neighbour.role: (late - early) / seconds
                for neighbour, early, late in zip(neighbours, theirs_before, theirs_after, strict=True)
            },
            memory=memory,
            idle_cores=idle,
            extra={
                f"{name}/request": (redis_after[name] - redis_before[name]) / max(1, merged.get("requests", 0))
                for name in redis_after
            },
        )

    @staticmethod
    def _take(neighbours: Sequence[Neighbour], seconds: float) -> list[dict[str, Any]]:
        """Return the counts of so many seconds, or of more where not one token came in these."""
        deadline = time.monotonic() + _PATIENCE
        totals: list[dict[str, Any]] = [{} for _ in neighbours]
        while True:
            time.sleep(seconds)
            for total, report in zip(totals, [neighbour.take() for neighbour in neighbours], strict=True):
                total |= {
                    name: value + total.get(name, 0) if isinstance(value, int) else value
                    for name, value in report.items()
                }
            if totals[0].get("tokens") or totals[0].get("errors") or time.monotonic() > deadline:
                return totals

    def _cpu(self) -> dict[str, float]:
        return {role: sum(map(cpu_seconds, processes)) for role, processes in self._processes.items()}


def ceiling(bench: Bench, load: Mapping[str, Any], rates: Sequence[float]) -> list[Measurement]:
    """Raise the steps per second until the service falls behind; the last measurement shows it there.

    It is behind when a tenth of the tokens is missing, or when they are late by more than a quarter of a second.
    """
    found = []
    for rate in rates:
        measurement = bench.measure(load, rate)
        found.append(measurement)
        late = measurement.latencies.get("latency", {}).get("p50", 0.0)
        if measurement.tokens_per_s < 0.9 * rate * int(load["streams"]) or late > 250.0:
            break
    return found
