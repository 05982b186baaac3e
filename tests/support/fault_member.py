"""One service of a line that is broken: its process, which is another one after a restart, at the same address."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import grpc
import psutil

from fault_wires import Wire
from scalellm.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from service_processes import PATIENCE, ServiceProcess


class Named(Protocol):
    """A service that is asked over gRPC; the name is for messages."""

    name: str
    address: str


class Member:
    """One service: its process, which may be another one after a restart, and the wire by which others reach it.

    Attributes:
        address: host:port where it listens, also while it is down or being started again.
    """

    def __init__(self, name: str, start: Callable[[bool], ServiceProcess], wire: Wire | None) -> None:
        self.name = name
        self.wire = wire
        self._start = start
        self.process = start(True)
        self.address = self.process.address

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    def child(self, module: str) -> psutil.Process:
        """A process below it that runs this module."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for child in self.process.children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if module in child.cmdline():
                        return child
            assert time.monotonic() < deadline, f"{self.name} runs no {module}:\n{self.process.log.read_text()[-4000:]}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *self.process.children()]

    def restart(self) -> None:
        """Start it again at the same address, once what was there has ended."""
        self.process.process.wait(PATIENCE)
        self.process = self._start(True)


async def state_of(scheduler: Named) -> scheduler_pb2.GetStateResponse:
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        request = scheduler_pb2.GetStateRequest()
        return await scheduler_pb2_grpc.SchedulerStub(channel).GetState(request, timeout=PATIENCE)


async def info_of(executor: Named) -> executor_pb2.GetExecutorInfoResponse:
    async with grpc.aio.insecure_channel(executor.address) as channel:
        request = executor_pb2.GetExecutorInfoRequest()
        return await executor_pb2_grpc.ExecutorStub(channel).GetInfo(request, timeout=PATIENCE)
