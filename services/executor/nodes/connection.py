"""A TCP connection between the fronts of two nodes, with the framing of the engine's sockets (`ipc`)."""

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
"""Most bytes of a message, since anyone who reaches the port can send one before the handshake."""

_BEATS = 6
"""Signs of life (NodeBeat) that are sent within the limit on silence."""


class NodeConnection:
    """Sends and receives the messages between two nodes, in order. Any end of the connection raises EOFError.

    Args:
        connection: A connected TCP socket, which this object owns from now on.
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
        """Connect to host:port. Raises OSError, or its subclass TimeoutError."""
        return cls(await asyncio.to_thread(socket.create_connection, split_address(address), DIAL_LIMIT))

    async def send(self, **message: object) -> None:
        """Send a message, given as the one field of NodeMessage that is set. Raises EOFError if the connection is
        broken.
        """
        payload = ranks_pb2.NodeMessage(**message).SerializeToString()  # type: ignore[arg-type]
        async with self._sending:
            try:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(self._connection, Message(Kind.NODE, payload=payload).encode())
            except OSError as error:
                raise EOFError(f"the connection broke: {error.strerror or error}") from None

    async def receive(self) -> ranks_pb2.NodeMessage:
        """Wait for the next message. Raises EOFError if the connection is closed, or its bytes are not a message."""
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
        """Read exactly `count` bytes, because later ones may be meant for the process that the socket is handed to."""
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
        """Send signs of life and receive messages until either end closes. Returns the reason of the end.

        Args:
            silence: Seconds without a message after which the other end counts as gone.
            on_message: Called with each message that is not a sign of life. An exception ends the conversation.
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
        with contextlib.suppress(EOFError):  # the task that listens notices the end
            while True:
                await self.send(beat=ranks_pb2.NodeBeat())
                await asyncio.sleep(interval)

    def detach(self) -> socket.socket:
        """Return the socket in blocking mode, for use without an event loop."""
        self._connection.setblocking(True)
        return self._connection

    def shut(self) -> None:
        """Shut the connection down, so that readers at both ends see its end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, from which no task may be reading."""
        self._connection.close()
