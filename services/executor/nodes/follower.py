"""A node other than 0: joins node 0, starts its ranks when node 0 asks for it, and joins again once the group ended."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import sys
from collections.abc import Mapping

from scalellm.services.common.child_process import Restarts
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_environment import engine_environment
from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.services.executor.nodes.handshake import HANDSHAKE_LIMIT, NodeRefusedError, introduce
from scalellm.services.executor.nodes.identity import Identity, identify
from scalellm.services.executor.rank_processes import RankProcesses
from scalellm.v1 import ranks_pb2

_log = logging.getLogger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 0.2, 5.0
_FORGET_AFTER = 60.0
_LAST_WORDS = 1.0
"""Seconds to wait, once a rank has ended, for node 0's message that the group ends, which may have ended the rank."""


class NodeState(enum.Enum):
    """State of a node other than 0."""

    WAITING = "waiting"
    """The node is not connected: node 0 cannot be reached, or refuses it."""
    JOINED = "joined"
    """Node 0 has accepted the node, and waits for the others."""
    SERVING = "serving"
    """The node's ranks are starting or running."""


class NodeFollower:
    """Keeps a node in the group of node 0.

    Args:
        settings: Settings of this node.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self._settings = settings
        self._ranks = RankProcesses()
        self._last_trouble = ""
        self._identity: Identity
        self._ended = asyncio.Event()
        self.state = NodeState.WAITING

    @property
    def rank_pids(self) -> Mapping[int, int]:
        """Process ids of this node's ranks, by rank."""
        return self._ranks.pids

    async def until_idle(self, limit: float) -> None:
        """Wait until the group has ended, for `limit` seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self.state is NodeState.SERVING:
                    self._ended.clear()
                    await self._ended.wait()

    async def run(self) -> None:
        """Join node 0 and serve one generation after the other, until cancelled. Raises StartError."""
        self._identity = await identify(self._settings)
        delays = Restarts(sys.maxsize, window=_FORGET_AFTER, first_delay=_FIRST_DELAY, longest_delay=_LONGEST_DELAY)
        _log.info("node %d waits for node 0 at %s", self._settings.node_rank, self._settings.leader)
        while True:
            try:
                connection = await self._join()
            except NodeRefusedError as error:
                self._say(logging.ERROR, f"node 0 at {self._settings.leader} refuses this node: {error}")
            except (OSError, EOFError, ConfigFileError) as error:
                self._say(logging.WARNING, f"node 0 at {self._settings.leader} cannot be reached: {error}")
            else:
                self._last_trouble = ""
                try:
                    await self._serve(connection)
                finally:
                    connection.close()
                    self.state = NodeState.WAITING
                    self._ended.set()
            await asyncio.sleep(delays.crashed() or 0)

    def _say(self, level: int, trouble: str) -> None:
        """Log the reason why the node cannot join, unless it is the same as the last one."""
        if trouble != self._last_trouble:
            self._last_trouble = trouble
            _log.log(level, "%s; it is tried again and again", trouble)

    async def _join(self, generation: str = "", rank: int = 0) -> NodeConnection:
        """Connect to node 0, as this node or for a rank. Raises OSError, EOFError and NodeRefusedError."""
        connection = await NodeConnection.dial(self._settings.leader)
        try:
            async with asyncio.timeout(HANDSHAKE_LIMIT):
                await introduce(connection, self._identity, generation, rank)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _serve(self, connection: NodeConnection) -> None:
        """Serve one generation, from node 0's welcome to the generation's end."""
        self.state = NodeState.JOINED
        _log.info("node 0 at %s has accepted this node", self._settings.leader)
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        was_stalled = False

        async def on_message(message: ranks_pb2.NodeMessage) -> None:
            nonlocal was_stalled
            if message.HasField("start") and not started.done():
                started.set_result(message.start.generation)
            was_stalled = message.end.stalled

        conversation = asyncio.create_task(connection.converse(self._settings.stall_limit_s, on_message))
        try:
            await asyncio.wait((conversation, started), return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                self.state = NodeState.SERVING
                await self._run_ranks(started.result(), connection, conversation)
            if conversation.done():
                _log.warning("node 0 is gone, or has ended the group: %s", conversation.result())
            if was_stalled:
                _log.error("no step was taken for too long; of the ranks here:%s", await self._ranks.stacks())
        finally:
            conversation.cancel()
            await asyncio.gather(conversation, return_exceptions=True)
            await self._ranks.kill()

    async def _run_ranks(self, generation: str, connection: NodeConnection, conversation: asyncio.Task[str]) -> None:
        """Start the ranks and wait until one of them, or the group, has ended."""
        connections: dict[int, NodeConnection] = {}
        try:
            for rank in self._settings.own_ranks:
                connections[rank] = await self._join(generation, rank)
            _log.info("generation %s: starting rank %s", generation, ", ".join(map(str, connections)))
            environment = engine_environment(os.environ, connection.local_host)
            sockets = {rank: connection.detach() for rank, connection in connections.items()}
            self._ranks = await RankProcesses.start(self._settings, environment, sockets)
        except (OSError, EOFError, NodeRefusedError) as error:
            _log.warning("the ranks of generation %s cannot be started: %s", generation, error)
            return
        finally:
            for one in connections.values():
                one.close()
        rank_ended = asyncio.create_task(self._ranks.first_end())
        try:
            await asyncio.wait((conversation, rank_ended), return_when=asyncio.FIRST_COMPLETED)
            if rank_ended.done() and not conversation.done():
                await asyncio.wait((conversation,), timeout=_LAST_WORDS)
            if rank_ended.done() and not conversation.done():
                _log.error("%s, and the group ends", rank_ended.result())
                with contextlib.suppress(EOFError):
                    await connection.send(end=ranks_pb2.NodeEnd(reason=rank_ended.result()))
        finally:
            rank_ended.cancel()
