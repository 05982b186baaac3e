"""The ranks of one start of an engine, on this host and on others, managed by the front of rank 0."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack

from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_environment import engine_environment
from scalellm.services.executor.nodes.generation import Generation
from scalellm.services.executor.nodes.leader import NodeLeader
from scalellm.services.executor.rank_processes import RankProcesses


class RankGroup:
    """The ranks that rank 0, the engine, leads, each by a socket. Made by `start`. There may be none.

    A group lives and dies as one: the front ends it when any of its processes has ended, a node is gone, or the engine
    stalls.

    Args:
        leader: Manages the other nodes; None: all ranks are on this host.

    Attributes:
        environment: Variables of all processes of the group.
    """

    def __init__(self, leader: NodeLeader | None = None) -> None:
        self.environment: Mapping[str, str] = {}
        self._leader = leader
        self._here = RankProcesses()
        self._elsewhere: Generation | None = None
        self._sockets: list[socket.socket] = []

    @classmethod
    async def start(cls, settings: ExecutorSettings, leader: NodeLeader | None) -> RankGroup:
        """Start the ranks that the settings ask for, once all nodes are there. Raises OSError."""
        group = cls(leader)
        try:
            await group._start(settings)
        except BaseException:
            await group.end("the ranks could not be started", stalled=False)
            raise
        return group

    async def _start(self, settings: ExecutorSettings) -> None:
        if self._leader is not None:
            self._elsewhere = await self._leader.gather()
            self.environment = engine_environment(os.environ, self._elsewhere.local_host)
        else:
            self.environment = engine_environment(os.environ)
        with ExitStack() as stack:
            connections = {}
            for rank in settings.own_ranks[1:]:
                leading, connections[rank] = socket.socketpair()
                self._sockets.append(leading)
                stack.enter_context(connections[rank])
            self._here = await RankProcesses.start(settings, self.environment, connections)

    @property
    def leader_descriptors(self) -> tuple[int, ...]:
        """Descriptors that the engine process inherits: its end of the socket to each rank, by rank."""
        elsewhere = self._elsewhere.sockets if self._elsewhere is not None else []
        return tuple(connection.fileno() for connection in (*self._sockets, *elsewhere))

    def close_sockets(self) -> None:
        """Close this process's copies of the sockets, so that the ranks see the end of theirs when the engine ends."""
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()
        if self._elsewhere is not None:
            self._elsewhere.close_sockets()

    @property
    def pids(self) -> Mapping[int, int]:
        """Process ids of the ranks on this host, by rank."""
        return self._here.pids

    async def first_end(self) -> str:
        """Wait until a rank on this host has ended, or another node is gone. Returns a text that says which,
        and why.
        """
        waiting = [asyncio.create_task(self._here.first_end())]
        if self._elsewhere is not None:
            waiting.append(asyncio.create_task(self._elsewhere.first_end()))
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return done.pop().result()

    @property
    def has_lost_node(self) -> bool:
        """True if another node is gone without having announced it, so that no crash of the group's processes
        is known.
        """
        return self._elsewhere is not None and self._elsewhere.has_lost_node

    async def stacks(self) -> str:
        """Return the stacks of all threads of the ranks on this host."""
        return await self._here.stacks()

    async def end(self, reason: str, *, stalled: bool) -> None:
        """End all ranks, here and on the other nodes.

        Args:
            reason: For the logs of other nodes.
            stalled: True if the engine took no step for too long. Other nodes then log the stacks of their ranks.
        """
        self.close_sockets()
        if self._leader is not None:
            await self._leader.end(reason, stalled=stalled)
        await self._here.kill()
