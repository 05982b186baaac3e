"""The processes of an engine's ranks other than 0, as the front keeps them beside the engine's own."""

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
    """Ranks that rank 0, the engine, leads by sockets of their own. Made by `start`; there may be none.

    A group lives and dies as one: the front ends it when any of its processes has ended or the engine stalls.
    """

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._sockets: list[socket.socket] = []

    @classmethod
    async def start(cls, settings: ExecutorSettings, environment: Mapping[str, str]) -> RankProcesses:
        """Start the ranks that the settings ask for. Raises OSError."""
        group = cls()
        try:
            for number in range(1, settings.num_ranks):
                await group._start(number, settings, environment)
        except BaseException:
            await group.kill()
            raise
        return group

    async def _start(self, number: int, settings: ExecutorSettings, environment: Mapping[str, str]) -> None:
        leader, own = socket.socketpair()
        self._sockets.append(leader)
        stacks = StackFile()
        with own:
            descriptors = (own.fileno(), stacks.fileno())
            process = await ChildProcess.start(
                python_module("scalellm.services.executor.ranks.rank_process", *map(str, (number, *descriptors))),
                environment,
                output=None,
                pass_fds=descriptors,
            )
        self._ranks.append(_Rank(number, process, stacks))
        process.tell(settings.model_dump(mode="json"))

    @property
    def leader_descriptors(self) -> tuple[int, ...]:
        """Descriptors for the engine's process to inherit: its end of a socket to each rank, in order."""
        return tuple(connection.fileno() for connection in self._sockets)

    def close_sockets(self) -> None:
        """The engine has them: when it ends, the ranks see the end of theirs."""
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()

    @property
    def pids(self) -> Mapping[int, int]:
        """The processes, by rank."""
        return {rank.number: rank.process.pid for rank in self._ranks}

    async def first_end(self) -> str:
        """Wait until one of them has ended. Returns which, and how; waits forever if there are none."""
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
        """Return what the threads of all of them do."""
        reports = await asyncio.gather(*(rank.stacks.ask(rank.process.pid) for rank in self._ranks))
        return "".join(f"\nrank {rank.number}:\n{text}" for rank, text in zip(self._ranks, reports, strict=True))

    async def kill(self) -> None:
        """Leave none behind."""
        self.close_sockets()
        for rank in self._ranks:
            await rank.process.kill()
            rank.stacks.close()
        self._ranks.clear()
