"""One start of a group over several hosts, on node 0."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.v1 import ranks_pb2

_LAST_WORDS = 1.0
"""Seconds for sending the end of the group to a node. A node that does not receive it sees the end of the
connection."""


class Member:
    """Another node, from its welcome to the end of its connection. It serves one generation at most."""

    def __init__(self, node_rank: int, connection: NodeConnection) -> None:
        self.node_rank = node_rank
        self.connection = connection
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to the reason of the end once the node is gone."""
        self._has_ended_itself = False

    @property
    def is_lost(self) -> bool:
        """True if the node is gone without having announced it, because its front, its host or the network failed."""
        return self.end.done() and not self._has_ended_itself

    async def hear(self, message: ranks_pb2.NodeMessage) -> None:
        """Handle a message that is not a sign of life: NodeEnd, after a rank of the node ended. Others are ignored."""
        if message.HasField("end"):
            self._has_ended_itself = True


class Generation:
    """The other nodes of one start of a group, and the sockets by which rank 0 leads their ranks.

    Args:
        name: Unique name of this start. A connection that names another one is too late, and refused.
        members: The other nodes.
        ranks_per_node: Number of ranks on every node.

    Attributes:
        local_host: IP address by which the other nodes reach this host.
    """

    def __init__(self, name: str, members: Sequence[Member], ranks_per_node: int) -> None:
        self.name = name
        self.members = members
        self._ranks_per_node = ranks_per_node
        self._sockets: dict[int, socket.socket] = {}
        self._num_ranks = len(members) * ranks_per_node
        self._complete = asyncio.Event()
        self.local_host = members[0].connection.local_host

    def refusal(self, node_rank: int, rank: int) -> str:
        """Return the reason to refuse a connection for a rank of a node; empty: it may connect."""
        if rank // self._ranks_per_node != node_rank:
            return f"rank {rank} is not one of node {node_rank}"
        return f"rank {rank} is already connected" if rank in self._sockets or self._complete.is_set() else ""

    def take(self, rank: int, connection: socket.socket) -> None:
        """Take over the connection of a rank."""
        self._sockets[rank] = connection
        if len(self._sockets) == self._num_ranks:
            self._complete.set()

    async def start(self) -> None:
        """Make all nodes start their ranks, and wait until these are connected. Raises EOFError if a node is gone."""
        for member in self.members:
            await member.connection.send(start=ranks_pb2.NodeStart(generation=self.name))
        waiting = {asyncio.create_task(self._complete.wait()), asyncio.create_task(self.first_end())}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if not self._complete.is_set():
            raise EOFError("a node is gone")

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets of the ranks, by rank, for the engine process to inherit."""
        return [self._sockets[rank] for rank in sorted(self._sockets)]

    def close_sockets(self) -> None:
        """Close this process's copies of the sockets, so that the ranks see the end of theirs when the engine ends."""
        for connection in self._sockets.values():
            connection.close()
        self._sockets.clear()

    async def first_end(self) -> str:
        """Wait until one of the nodes is gone. Returns a text that says which, and why."""
        await asyncio.wait([member.end for member in self.members], return_when=asyncio.FIRST_COMPLETED)
        member = next(member for member in self.members if member.end.done())
        return f"node {member.node_rank} has left: {member.end.result()}"

    @property
    def has_lost_node(self) -> bool:
        """True if one of the nodes is gone without having announced it."""
        return any(member.is_lost for member in self.members)

    async def end(self, reason: str, *, stalled: bool) -> None:
        """Send the end of the generation to the nodes and close their connections. They connect again for the
        next one.
        """
        self.close_sockets()
        end = ranks_pb2.NodeEnd(reason=reason, stalled=stalled)
        await asyncio.gather(*(_say_last(member.connection, end) for member in self.members))


async def _say_last(connection: NodeConnection, end: ranks_pb2.NodeEnd) -> None:
    with contextlib.suppress(EOFError, TimeoutError):
        async with asyncio.timeout(_LAST_WORDS):
            await connection.send(end=end)
    connection.shut()
