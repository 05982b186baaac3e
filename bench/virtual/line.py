"""Schedulers and edges on virtual time: the real scheduler with its fleet, and the real link of a tokenizer worker."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from bench.virtual.executor import TOKENIZER
from bench.virtual.loop import VirtualLoop
from bench.virtual.network import Network, VirtualDialer, VirtualProcess
from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from scalellm.services.scheduler.service import SchedulerService
from scalellm.services.tokenizer.schedulers import Schedulers


class VirtualScheduler:
    """A scheduler process that comes back.

    Args:
        network: Network on which it listens, and its executors.
        address: host:port.
        executors: Addresses of those that it knows from the start.
        settings: Its settings; the limits on silence and the lease are among them.

    Attributes:
        dispatchers: One for each model.
        fleet: The executors of the first model.
        placement: Placement of the first model.
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
        affinity = AffinityStore(None, 60)
        clock = asyncio.get_running_loop().time
        self.dispatchers = Dispatchers(lambda: Dispatcher(settings, instance, affinity, dialer=dialer, clock=clock))
        first, *_ = self.dispatchers
        self.fleet, self.placement = first.fleet, first.placement
        discovery = ExecutorDiscovery(self.dispatchers, settings.executor_resolve_s)
        self.service = SchedulerService(instance, 1.0, self.dispatchers, discovery, affinity, settings.lease_s)
        self.dispatchers.start()
        for address in self._executors:
            self.dispatchers.add(address)
        self._network.serve(self.address, self.process, self.service.Connect)

    async def die(self) -> None:
        """Die as by kill -9."""
        self.process.die()
        await self.dispatchers.stop()

    async def drain(self, limit: float) -> None:
        """Drain as on SIGTERM."""
        process, dispatchers = self.process, self.dispatchers
        dispatchers.begin_drain()
        await dispatchers.wait_idle(limit)
        dispatchers.end_all(StatusError.unavailable("the scheduler stopped", retry_after=1.0), moved=True)
        await asyncio.sleep(0.1)  # the last words
        if self.process is process:  # it did not die meanwhile
            await self.die()


class VirtualEdge:
    """A tokenizer worker's links.

    Args:
        network: Network on which its schedulers listen.
        name: Name of the worker.
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
