"""grpc.health.v1, driven by progress: unhealthy while there is work and nothing moves, whatever else answers."""

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
"""Name under which a process is SERVING as long as it answers, whatever it lacks to do its work: who gets no answer may
start it anew, while one that is NOT_SERVING under the other names waits for others, or finishes what it has."""


class Heartbeat:
    """Remembers when work last advanced.

    Args:
        stall_limit: Seconds of silence, while there is work, that mean trouble.
        clock: Monotonic seconds.
    """

    def __init__(self, stall_limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_limit = stall_limit
        self._clock = clock
        self._last_beat = clock()
        self._num_beats = 0
        self._has_work = False

    def beat(self, has_work: bool) -> None:
        """Work advanced, and there is (or is not) more."""
        self._last_beat = self._clock()
        self._num_beats += 1
        self._has_work = has_work

    def expect_work(self) -> None:
        """Work came; from now on silence counts."""
        if not self._has_work:
            self._last_beat = self._clock()
            self._has_work = True

    @property
    def is_alive(self) -> bool:
        """False while there is work and nothing has moved for the stall limit."""
        return not self._has_work or self._clock() - self._last_beat < self._stall_limit

    async def until_stalled(self) -> None:
        """Return once there has been work and no beat for the stall limit, by this process's own reckoning: a time in
        which it stood still itself does not count, as beats of that time are yet to be heard.
        """
        await until_silent(self._stall_limit, lambda: self._num_beats, lambda: self._has_work)


class _Servicer(health.aio.HealthServicer):  # type: ignore[misc]
    """Answers a check with the status of this instant."""

    def __init__(self, refresh: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._refresh = refresh

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service."""
        await self._refresh()
        return await super().Check(request, context)


class HealthReporter:
    """Publishes one status for all services of a process, and beside it that the process answers.

    Args:
        services: Full names of the services; the empty name stands for the process.
        is_ready: Called about twice a second, for those who watch, and for every check; True means SERVING.
    """

    def __init__(self, services: Sequence[str], is_ready: Callable[[], bool]) -> None:
        self.servicer = _Servicer(self.publish)
        self._services = ("", *services)
        self._is_ready = is_ready
        self._published: bool | None = None

    async def publish(self) -> None:
        """Bring the published status up to date."""
        if self._published is None:
            await self.servicer.set(LIVENESS, _SERVING)
        ready = self._is_ready()
        if ready != self._published:
            self._published = ready
            for service in self._services:
                await self.servicer.set(service, _SERVING if ready else _NOT_SERVING)

    async def run(self, interval: float = 0.5) -> None:
        """Publish until cancelled; then say NOT_SERVING for good."""
        try:
            while True:
                await self.publish()
                await asyncio.sleep(interval)
        finally:
            await self.servicer.enter_graceful_shutdown()
