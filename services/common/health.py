"""grpc.health.v1, driven by progress: a service with work that makes no progress is unhealthy, even if it answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2

from scalellm.services.common.silence import until_silent

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

LIVENESS = "liveness"
"""Service name under which a process is SERVING as long as it answers. A process that does not answer may be restarted,
while one that is NOT_SERVING under the other names only waits for other services, or drains."""


class Heartbeat:
    """Records when work last made progress.

    Args:
        stall_limit: Seconds without progress, while there is work, after which the process counts as stalled.
        clock: Monotonic seconds.
    """

    def __init__(self, stall_limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_limit = stall_limit
        self._clock = clock
        self._last_beat = clock()
        self._num_beats = 0
        self._has_work = False

    def beat(self, has_work: bool) -> None:
        """Record progress, and whether there is more work."""
        self._last_beat = self._clock()
        self._num_beats += 1
        self._has_work = has_work

    def expect_work(self) -> None:
        """Record that there is work, so that missing progress counts from now on."""
        if not self._has_work:
            self._last_beat = self._clock()
            self._has_work = True

    @property
    def is_alive(self) -> bool:
        """False if there is work and there was no progress for the stall limit."""
        return not self._has_work or self._clock() - self._last_beat < self._stall_limit

    async def until_stalled(self) -> None:
        """Wait until there has been work without a beat for the stall limit. Time in which this process itself was
        stopped does not count, because beats of that time have not been received yet.
        """
        await until_silent(self._stall_limit, lambda: self._num_beats, lambda: self._has_work)


class _Servicer(health.aio.HealthServicer):  # type: ignore[misc]
    """Answers a check with the current status, after updating it."""

    def __init__(self, refresh: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._refresh = refresh

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the current status of a service."""
        await self._refresh()
        return await super().Check(request, context)


class HealthReporter:
    """Publishes one common status of all services of a process, and its liveness.

    Args:
        services: Full names of the services; the empty name stands for the process.
        is_ready: Called about twice a second, for watchers, and at every check. True means SERVING.
    """

    def __init__(self, services: Sequence[str], is_ready: Callable[[], bool]) -> None:
        self.servicer = _Servicer(self.publish)
        self._services = ("", *services)
        self._is_ready = is_ready
        self._published: bool | None = None

    async def publish(self) -> None:
        """Update the published status."""
        if self._published is None:
            await self.servicer.set(LIVENESS, _SERVING)
        ready = self._is_ready()
        if ready != self._published:
            self._published = ready
            for service in self._services:
                await self.servicer.set(service, _SERVING if ready else _NOT_SERVING)

    async def run(self, interval: float = 0.5) -> None:
        """Publish until cancelled, and then NOT_SERVING for good."""
        try:
            while True:
                await self.publish()
                await asyncio.sleep(interval)
        finally:
            await self.servicer.enter_graceful_shutdown()
