"""A release of the chart with real containers, as something that trials break: reached and asked from outside."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import grpc

from chart_release import ChartRelease, Pod
from fault_member import state_of
from fault_rest import executor_problems, scheduler_problems, tokenizer_problems
from fault_wires import Wires
from kube_cluster import LIMIT
from line import scrape
from mixed_load import total
from scalellm.v1 import scheduler_pb2

_DOORS = 2
_PORTS = {"tokenizer": (50051, 9151), "scheduler": (50052, 9152), "executor": (50061, 9161)}
_WORKERS = 2
"""Workers of a tokenizer, by the chart's own values."""


@dataclass(frozen=True)
class PodService:
    """The service in a pod, by addresses that answer outside the cluster."""

    name: str
    address: str
    metrics_address: str

    @classmethod
    def of(cls, component: str, pod: Pod) -> PodService:
        port, metrics_port = _PORTS[component]
        return cls(pod.name, f"{pod.address}:{port}", f"{pod.address}:{metrics_port}")


class Doors:
    """Addresses outside the cluster that lead to the tokenizers which are ready, as those of a load balancer do.

    A connection goes where its address leads when it is made, and stays there. Use it as a context manager.
    """

    def __init__(self, release: ChartRelease) -> None:
        self._release = release
        self._wires = Wires()
        self._watch: subprocess.Popen[str] = release.watch_ready("tokenizer")
        self._thread = threading.Thread(target=self._follow, name="doors", daemon=True)
        self._is_open = threading.Event()
        self._is_over = threading.Event()

    def __enter__(self) -> Doors:
        self._wires.__enter__()
        self._doors = [self._wires.add("127.0.0.1:1") for _ in range(_DOORS)]
        self._thread.start()
        assert self._is_open.wait(LIMIT), "no tokenizer is ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        while self._thread.is_alive():
            self._watch.terminate()
            self._thread.join(1)
        self._wires.__exit__()

    @property
    def addresses(self) -> list[str]:
        return [door.address for door in self._doors]

    def _follow(self) -> None:
        while True:
            for line in self._watch.stdout or ():
                ready = line.split()
                if not ready:
                    continue
                for number, door in enumerate(self._doors):
                    door.target = f"{ready[number % len(ready)]}:{_PORTS['tokenizer'][0]}"
                self._is_open.set()
            self._watch.wait()
            if self._is_over.wait(1):
                return
            self._watch = self._release.watch_ready("tokenizer")  # the API ends each one after half an hour


class ClusterLine:
    """A release behind its doors.

    Attributes:
        counts: Pods of each component, as they should be.
    """

    def __init__(self, release: ChartRelease, doors: Doors, counts: Mapping[str, int]) -> None:
        self.release = release
        self.counts = dict(counts)
        self._doors = doors

    @property
    def addresses(self) -> list[str]:
        return self._doors.addresses

    async def services(self, component: str) -> list[PodService]:
        """Return the services of a component."""
        return [PodService.of(component, pod) for pod in await asyncio.to_thread(self.release.pods, component)]

    async def wait_linked(self) -> None:
        """Wait until all pods are ready, and linked to each other."""
        await self._until(self._missing)

    async def rest(self, before: Mapping[str, object] | None = None) -> dict[str, object]:
        """Wait until nothing runs and the books add up. Memory is not looked at: pods come and go."""
        await self._until(self._unrest)
        return {"at rest": True}

    async def _until(self, problems: Callable[[], Awaitable[list[str]]]) -> None:
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                found = await problems()
            except (grpc.aio.AioRpcError, OSError) as error:  # a pod that is gone
                found = [repr(error)]
            if not found:
                return
            assert time.monotonic() < deadline, "; ".join(found)
            await asyncio.sleep(1)

    async def _missing(self) -> list[str]:
        ready = await asyncio.to_thread(self.release.ready)
        if ready != self.counts:
            return [f"{ready} are ready, not {self.counts}"]
        found = []
        for scheduler in await self.services("scheduler"):
            phases = [executor.phase for executor in (await state_of(scheduler)).executors]
            if phases.count(scheduler_pb2.EXECUTOR_PHASE_READY) != self.counts["executor"]:
                found.append(f"{scheduler.name} knows executors in phases {phases}")
            metrics = await asyncio.to_thread(scrape, scheduler)
            links = total(metrics, "scalellm_scheduler_links", 'peer="tokenizer"')
            if links != _WORKERS * self.counts["tokenizer"]:
                found.append(f"{scheduler.name} has {links:.0f} links from tokenizers")
        return found

    async def _unrest(self) -> list[str]:
        found = []
        for executor in await self.services("executor"):
            found += await executor_problems(executor)
        for scheduler in await self.services("scheduler"):
            found += await scheduler_problems(scheduler)
        for tokenizer in await self.services("tokenizer"):
            found += await tokenizer_problems(tokenizer.name, tokenizer)
        return found
