"""The generator's own use of the machine: its figures are only worth something while it keeps up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np

_INTERVAL = 0.1
BUSY_CPU = 0.8
BUSY_LAG_MS = 20.0


@dataclass(frozen=True, slots=True)
class GeneratorUse:
    """The generator's use of the machine in one step.

    Attributes:
        cpu_share: CPU time of the process, all its threads, over wall time. Its event loop is one thread: 1 is all.
        lag_p99_ms: Lag of the event loop, in milliseconds; as much is in each measured latency.
        lag_max_ms: The same, at worst.
        messages_per_cpu_s: Messages handled per second of CPU time: about what it can do.
    """

    cpu_share: float
    lag_p99_ms: float
    lag_max_ms: float
    messages_per_cpu_s: float

    def warnings(self) -> list[str]:
        """The reasons why the figures may be the generator's and not the server's; empty while it keeps up."""
        found = []
        if self.cpu_share > BUSY_CPU:
            found.append(f"the load generator used {self.cpu_share:.0%} of a CPU: it may be the bottleneck")
        if self.lag_p99_ms > BUSY_LAG_MS:
            found.append(f"the load generator's event loop lagged {self.lag_p99_ms:.0f} ms (p99): latencies contain it")
        return found


class Meter:
    """Measures from entering to leaving the context, in the running event loop."""

    async def __aenter__(self) -> Meter:
        self._lags: list[float] = []
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *failure: object) -> None:
        self._cpu, self._wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self._watching.cancel()

    def use(self, num_messages: int) -> GeneratorUse:
        """The measured use, after the context was left."""
        lags = 1e3 * np.asarray(self._lags or [0.0])
        return GeneratorUse(
            cpu_share=self._cpu / self._wall,
            lag_p99_ms=float(np.percentile(lags, 99)),
            lag_max_ms=float(lags.max()),
            messages_per_cpu_s=num_messages / max(self._cpu, 1e-9),
        )

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            self._lags.append(max(0.0, time.perf_counter() - due))
