"""A TCP connection between the processes in front of two nodes' ranks, with the frames of the engine's own sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from scalellm.services.common.addresses import join_address, split_address
from scalellm.services.common.silence import until_silent
from scalellm.services.executor.ipc import HEADER_BYTES, Kind, Message, read_header
from scalellm.v1 import ranks_pb2

DIAL_LIMIT = 5.0
"""Seconds for a connection to be made."""

_MOST_BYTES = 1 << 16
"""Limit of a message: whoever reaches the port may send one."""

_BEATS = 6
"""Signs of life within the limit on silence."""


class NodeConnection:
    """Messages of two nodes, in order. Whatever ends it is an EOFError.

    Args:
        connection: A connected TCP socket, which belongs to this object from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._sending = asyncio.Lock()
        self._num_heard = 0
        host, port, *_ = connection.getpeername()
        self.peer = join_address(host, port)
        """Address of the other end."""
        self.local_host = str(connection.getsockname()[0])
        """IP address of this end."""

    @classmethod
    async def dial(cls, address: str) -> NodeConnection:
        """Connect to host:port. Raises OSError, of which TimeoutError is one."""
        return cls(await asyncio.to_thread(socket.create_connection, split_address(address), DIAL_LIMIT))

    async def send(self, **message: object) -> None:
        """Write a message, of which the one field of NodeMessage is given. EOFError: nobody reads it."""
        payload = ranks_pb2.NodeMessage(**message).SerializeToString()  # type: ignore[arg-type]
        async with self._sending:
            try:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(self._connection, Message(Kind.NODE, payload=payload).encode())
            except OSError as error:
                raise EOFError(f"the connection broke: {error.strerror or error}") from None

    async def receive(self) -> ranks_pb2.NodeMessage:
        """Wait for the next message. EOFError: none comes, or it is none."""
        kind, length = read_header(await self._read(HEADER_BYTES))
        if kind != Kind.NODE or length > _MOST_BYTES:
            raise EOFError(f"{self.peer} sent what is no message of a node")
        payload = await self._read(length)
        self._num_heard += 1
        try:
            return ranks_pb2.NodeMessage.FromString(payload)
        except DecodeError:
            raise EOFError(f"{self.peer} sent what is no message of a node") from None

    async def _read(self, count: int) -> bytes:
        """Read so many bytes and no more: what follows may be for whoever the socket is handed to."""
        data = b""
        while len(data) < count:
            try:
                part = await asyncio.get_running_loop().sock_recv(self._connection, count - len(data))
            except OSError as error:
                raise EOFError(f"the connection broke: {error.strerror or error}") from None
            if not part:
                raise EOFError("the connection was closed")
            data += part
        return data

    async def converse(self, silence: float, on_message: Callable[[ranks_pb2.NodeMessage], Awaitable[None]]) -> str:
        """Show signs of life and take in messages until either end closes. Returns why it ended.

        Args:
            silence: Seconds without a word after which the other end counts as gone.
            on_message: Called with all messages but signs of life; what it raises ends the conversation.
        """
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen(on_message))
            silent = tasks.create_task(until_silent(silence, lambda: self._num_heard))
            beating = tasks.create_task(self._beat(silence / _BEATS))
            await asyncio.wait((listening, silent), return_when=asyncio.FIRST_COMPLETED)
            why = listening.result() if listening.done() else f"it has said nothing for {silence:g} s"
            for task in (listening, silent, beating):
                task.cancel()
        return why

    async def _listen(self, on_message: Callable[[ranks_pb2.NodeMessage], Awaitable[None]]) -> str:
        while True:
            try:
                message = await self.receive()
            except EOFError as error:
                return str(error)
            match message.WhichOneof("message"):
                case "beat":
                    pass
                case "end":
                    await on_message(message)
                    return message.end.reason
                case _:
                    await on_message(message)

    async def _beat(self, interval: float) -> None:
        with contextlib.suppress(EOFError):  # whoever listens notices
            while True:
                await self.send(beat=ranks_pb2.NodeBeat())
                await asyncio.sleep(interval)

    def detach(self) -> socket.socket:
        """Return the socket, to be used without an event loop."""
        self._connection.setblocking(True)
        return self._connection

    def shut(self) -> None:
        """End the connection for both: whoever reads from it sees the end, here as well."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, from which nobody reads any more."""
        self._connection.close()
