"""Schedulers and edges on virtual time: the real scheduler with its fleet, and the real link of a tokenizer worker."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from bench.virtual.executor import TOKENIZER
from bench.virtual.loop import VirtualLoop
from bench.virtual.network import Network, VirtualDialer, VirtualProcess
from scalellm.services.common.errors import StatusError
from scalellm.services.common.health import Heartbeat
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from scalellm.services.scheduler.fleet import Fleet
from scalellm.services.scheduler.intake import Intake
from scalellm.services.scheduler.placement import Placement
from scalellm.services.scheduler.service import SchedulerService
from scalellm.services.tokenizer.schedulers import Schedulers


class VirtualScheduler:
    """A scheduler process that comes back.

    Args:
        network: Where it listens, and its executors.
        address: host:port.
        executors: Addresses of those that it knows from the start.
        settings: What it was told; the limits on silence and the lease are among them.
    """

    def __init__(
        self, network: Network, address: str, executors: Collection[str], settings: SchedulerSettings | None = None
    ) -> None:
        self.address = address
        self._network = network
        self._settings = settings or SchedulerSettings()
        self._executors = executors
        self._num_starts = 0
        self.start()

    def start(self) -> None:
        """A new incarnation."""
        self._num_starts += 1
        settings = self._settings
        instance = f"{self.address}#{self._num_starts}"
        self.process = VirtualProcess(instance)
        dialer = VirtualDialer(self._network, self.process)
        self.fleet = Fleet(instance, settings.stall_limit_s, dialer, settings.pool_policy)
        affinity = AffinityStore(None, 60)
        heartbeat = Heartbeat(settings.stall_limit_s, clock=asyncio.get_running_loop().time)
        self.placement = Placement(settings, self.fleet, affinity, heartbeat)
        self.intake = Intake(self.placement)
        discovery = ExecutorDiscovery(self.fleet, settings.executor_resolve_s)
        self.service = SchedulerService(
            instance, 1.0, self.intake, self.placement, self.fleet, discovery, affinity, settings.lease_s
        )
        self.placement.start()
        for address in self._executors:
            self.fleet.add(address)
        self._network.serve(self.address, self.process, self.service.Connect)

    async def die(self) -> None:
        """As by kill -9."""
        self.process.die()
        self.placement.stop()
        await self.fleet.stop()

    async def drain(self, limit: float) -> None:
        """As on SIGTERM."""
        process, intake = self.process, self.intake
        intake.begin_drain()
        await self.placement.wait_idle(limit)
        intake.end_all(StatusError.unavailable("the scheduler stopped", retry_after=1.0), moved=True)
        await asyncio.sleep(0.1)  # the last words
        if self.process is process:  # it did not die meanwhile
            await self.die()


class VirtualEdge:
    """A tokenizer worker's links.

    Args:
        network: Where its schedulers listen.
        name: Of the worker.
        schedulers: Their addresses.
        silence_limit: See Schedulers.
    """

    def __init__(
        self, network: Network, name: str, schedulers: Collection[str], *, silence_limit: float = 30.0
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.process = VirtualProcess(name)
        self.link = Schedulers(
            tuple(schedulers),
            name,
            TOKENIZER,
            silence_limit=silence_limit,
            dialer=VirtualDialer(network, self.process),
            clock=loop.time_ns,
        )
        self._running = asyncio.create_task(self.link.run())
