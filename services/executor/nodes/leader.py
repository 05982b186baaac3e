"""Node 0's side of a group over several hosts: it listens for the other nodes and starts a generation with them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Coroutine

from scalellm.services.common.addresses import bound_socket, split_address
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.services.executor.nodes.generation import Generation, Member
from scalellm.services.executor.nodes.handshake import HANDSHAKE_LIMIT, NodeRefusedError, admit
from scalellm.services.executor.nodes.identity import Identity, identify
from scalellm.v1 import ranks_pb2

_log = logging.getLogger(__name__)

_START_LIMIT = 30.0
"""Seconds for all ranks to be connected once all nodes are there."""

_NAME_LIMIT = 60.0
_SAY_AGAIN = 30.0
_ACCEPT_PAUSE = 0.2
_MOST_STRANGERS = 32
"""Most connections whose handshake is not complete, in addition to one for each rank."""


class NodeLeader:
    """Keeps the connections of the other nodes, and starts a generation once all are connected.

    Args:
        settings: Settings of node 0.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self._settings = settings
        self._members: dict[int, Member] = {}
        self._changed = asyncio.Event()
        self._generation: Generation | None = None
        self._num_generations = 0
        self._num_strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._identity: Identity

    async def open(self) -> None:
        """Listen. Raises StartError."""
        self._identity = await identify(self._settings)
        self._listener = await self._listen()
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    async def _listen(self) -> socket.socket:
        """Listen at --leader, retrying while its name does not resolve, as it may appear only once this host has
        started. Raises StartError.
        """
        deadline = time.monotonic() + _NAME_LIMIT
        while True:
            try:
                listener = await asyncio.to_thread(bound_socket, *split_address(self._settings.leader))
                listener.listen()
                return listener
            except OSError as error:
                if not isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                    raise StartError(
                        f"--leader {self._settings.leader}: node 0 cannot listen there: {error.strerror or error}"
                    ) from None
            await asyncio.sleep(1)

    async def close(self) -> None:
        """Close all connections and stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    @property
    def num_missing(self) -> int:
        """Number of other nodes that are not connected."""
        return self._settings.nodes - 1 - len(self._members)

    async def gather(self) -> Generation:
        """Wait without limit until all nodes are connected, and start a generation with them."""
        while True:
            await self._all_here()
            self._num_generations += 1
            name = f"{self._num_generations}-{secrets.token_hex(8)}"
            members = [self._members[number] for number in sorted(self._members)]
            generation = self._generation = Generation(name, members, self._settings.ranks_per_node)
            try:
                async with asyncio.timeout(_START_LIMIT):
                    await generation.start()
            except (EOFError, TimeoutError) as error:
                why = str(error) or f"the ranks were not connected within {_START_LIMIT:g} s"
                _log.warning("generation %s of the group does not start: %s", name, why)
                await self.end(why, stalled=False)
            except BaseException:
                await self.end("node 0 is shutting down", stalled=False)
                raise
            else:
                _log.info("generation %s: all %d nodes are here", name, self._settings.nodes)
                return generation

    async def end(self, reason: str, *, stalled: bool) -> None:
        """End the generation, if there is one, and disconnect its nodes, which connect again for the next one."""
        generation, self._generation = self._generation, None
        if generation is not None:
            for member in generation.members:  # only if it is the same one: a node may have reconnected already
                self._forget(member)
            await generation.end(reason, stalled=stalled)

    async def _all_here(self) -> None:
        while missing := [str(node) for node in range(1, self._settings.nodes) if node not in self._members]:
            _log.info("waiting for node %s to connect to %s", ", ".join(missing), self._settings.leader)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SAY_AGAIN):
                    await self._changed.wait()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # the peer is gone already, or this process has no free descriptor
                _log.warning("a connection of a node was lost: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if self._num_strangers >= _MOST_STRANGERS + self._settings.num_ranks:
                connection.close()
                continue
            self._spawn(self._serve(connection))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        """Serve one connection: a node's until it ends, a rank's until it is handed to the generation."""
        with contextlib.ExitStack() as stack:
            stack.callback(accepted.close)
            self._num_strangers += 1
            try:
                connection = NodeConnection(accepted)
                async with asyncio.timeout(HANDSHAKE_LIMIT):
                    hello = await admit(connection, self._identity, self._refusal)
            except NodeRefusedError as error:
                _log.warning("node %s is refused: %s", connection.peer, error)
                return
            except (EOFError, OSError, ConfigFileError) as error:
                _log.warning("a connection to %s ends before it is welcome: %s", self._settings.leader, error)
                return
            finally:
                self._num_strangers -= 1
            if self._refusal(hello):  # the state may have changed during the handshake
                return
            if hello.generation:
                assert self._generation is not None
                self._generation.take(hello.rank, connection.detach())
                stack.pop_all()
            else:
                await self._keep(Member(hello.node_rank, connection))

    def _refusal(self, hello: ranks_pb2.NodeHello) -> str:
        """Return the reason why a node or a rank may not join now; empty: it may."""
        node = hello.node_rank
        if not 0 < node < self._settings.nodes:
            return f"--node-rank {node}: must be 1 to {self._settings.nodes - 1}, and each node has another"
        if not hello.generation:
            known = self._members.get(node)
            return f"--node-rank {node}: {known.connection.peer} has the same, and is here" if known is not None else ""
        if self._generation is None or hello.generation != self._generation.name:
            return f"generation {hello.generation} of the group is over"
        return self._generation.refusal(node, hello.rank)

    async def _keep(self, member: Member) -> None:
        """Receive a node's messages until it is gone."""
        self._members[member.node_rank] = member
        self._changed.set()
        _log.info("node %d is here, from %s", member.node_rank, member.connection.peer)
        why = "node 0 is shutting down"
        try:
            why = await member.connection.converse(self._settings.stall_limit_s, member.hear)
        finally:
            self._forget(member)
            member.end.set_result(why)

    def _forget(self, member: Member) -> None:
        if self._members.get(member.node_rank) is member:
            del self._members[member.node_rank]
