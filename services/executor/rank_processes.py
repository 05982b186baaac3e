"""The processes of an engine's ranks other than 0 on one host, managed by the front of that host."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from scalellm.services.common.child_process import ChildProcess, describe_exit, python_module
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.stall_report import StackFile


@dataclass(frozen=True)
class _Rank:
    number: int
    process: ChildProcess
    stacks: StackFile


class RankProcesses:
    """The rank processes of one host, which rank 0, the engine, leads, each by a socket. Made by `start`. There may be
    none.

    A group lives and dies as one: it ends when any of its processes has ended or the engine stalls.
    """

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []

    @classmethod
    async def start(
        cls, settings: ExecutorSettings, environment: Mapping[str, str], connections: Mapping[int, socket.socket]
    ) -> RankProcesses:
        """Start ranks. Raises OSError.

        Args:
            settings: Handed to each of them.
            environment: Their variables.
            connections: By rank, its end of the socket to rank 0, which it inherits. The caller closes it.
        """
        group = cls()
        try:
            for rank, connection in connections.items():
                await group._start(rank, settings, environment, connection)
        except BaseException:
            await group.kill()
            raise
        return group

    async def _start(
        self, number: int, settings: ExecutorSettings, environment: Mapping[str, str], connection: socket.socket
    ) -> None:
        stacks = StackFile()
        descriptors = (connection.fileno(), stacks.fileno())
        process = await ChildProcess.start(
            python_module("scalellm.services.executor.ranks.rank_process", *map(str, (number, *descriptors))),
            environment,
            output=None,
            pass_fds=descriptors,
        )
        self._ranks.append(_Rank(number, process, stacks))
        process.tell(settings.model_dump(mode="json"))

    @property
    def pids(self) -> Mapping[int, int]:
        """Process ids, by rank."""
        return {rank.number: rank.process.pid for rank in self._ranks}

    async def first_end(self) -> str:
        """Wait until a rank has ended. Returns a text that says which, and how. Waits forever if there are no ranks."""
        waiting = {asyncio.create_task(rank.process.wait()): rank for rank in self._ranks}
        if not waiting:
            await asyncio.Event().wait()
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        task = min(done, key=lambda one: waiting[one].number)
        return f"rank {waiting[task].number} ended with {describe_exit(task.result())}"

    async def stacks(self) -> str:
        """Return the stacks of all threads of all ranks."""
        reports = await asyncio.gather(*(rank.stacks.ask(rank.process.pid) for rank in self._ranks))
        return "".join(f"\nrank {rank.number}:\n{text}" for rank, text in zip(self._ranks, reports, strict=True))

    async def kill(self) -> None:
        """Kill all ranks."""
        for rank in self._ranks:
            await rank.process.kill()
            rank.stacks.close()
        self._ranks.clear()
