"""Messages between the executor's front and its engine process, over a socket pair; those of ranks go over TCP as well.

A message is a fixed header (kind, link, length) and a payload: serialised protobuf, never pickle. The front forwards
the payloads of links without looking into them.
"""

from __future__ import annotations

import asyncio
import enum
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

_HEADER = struct.Struct("<BII")
HEADER_BYTES = _HEADER.size
_READ_BYTES = 1 << 18


class Kind(enum.IntEnum):
    """The kind of a message. The payload stands behind the dash."""

    OPEN = 1
    """Front: a scheduler opened a link - ClientFrame with its Hello."""
    FRAME = 2
    """Both: a frame of a link - ClientFrame or ServerFrame."""
    CLOSE = 3
    """Front: the link is gone."""
    DRAIN = 4
    """Front: take no new requests."""
    WELCOME = 5
    """Engine: the link is accepted - ServerFrame with the Welcome."""
    REFUSE = 6
    """Engine: the link is refused, or broke the protocol - LinkStatus."""
    PROGRESS = 7
    """Engine: the model is being loaded - text for the log."""
    STATS = 8
    """Engine: periodic report - GetExecutorInfoResponse. The first one means that the model is loaded."""
    FATAL = 9
    """Engine: it cannot start - one line that says why and what to change."""
    GIVE_BACK = 11
    """Front: give all requests back to their schedulers, which move them."""
    TRACE = 10
    """Engine: a traced request ended - TracedRequest."""
    PLAN = 12
    """Rank 0 of an engine, to each other rank: the next action of all ranks - RankPlan."""
    NODE = 13
    """Both, between the fronts of an executor's nodes - NodeMessage."""
    TAKEN = 14
    """Engine: frames of a link were taken in, so others may follow - their cost (`frame_window`), as a decimal
    number."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `link` is 0 where it concerns no link."""

    kind: Kind
    link: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        """Header and payload."""
        return _HEADER.pack(self.kind, self.link, len(self.payload)) + self.payload


def read_header(header: bytes) -> tuple[int, int]:
    """Return the kind of a message, as a number, and the size of its payload in bytes, from its HEADER_BYTES bytes."""
    kind, _, length = _HEADER.unpack(header)
    return kind, length


class EngineChannel:
    """The engine's end of the connection to the front, and both ends of those between ranks. Blocking; used between
    steps.

    Args:
        connection: Its half of the socket pair.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    @property
    def local_host(self) -> str:
        """This end's IP address; empty within a socket pair."""
        if self._connection.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        return str(self._connection.getsockname()[0])

    def send(self, *messages: Message) -> None:
        """Write messages, waiting while the other end is busy. Raises EOFError if it is gone."""
        if not messages:
            return
        try:
            self._connection.sendall(b"".join(message.encode() for message in messages))
        except ConnectionError:
            raise EOFError("the other end closed the connection") from None

    def receive(self, timeout: float) -> Iterator[Message]:
        """Iterate over the messages that have arrived, waiting up to `timeout` seconds for the first. Raises EOFError
        if the other end is gone.
        """
        if not self._has_message():
            while self._poll.poll(timeout * 1000):
                try:
                    data = self._connection.recv(_READ_BYTES)
                except ConnectionError:  # the other end was closed with unread data
                    data = b""
                if not data:
                    raise EOFError("the other end closed the connection")
                self._buffer += data
                timeout = 0.0
        yield from _take_messages(self._buffer)

    def _has_message(self) -> bool:
        if len(self._buffer) < _HEADER.size:
            return False
        length: int = _HEADER.unpack_from(self._buffer)[2]
        return len(self._buffer) >= _HEADER.size + length


class FrontChannel(asyncio.Protocol):
    """The front's end of the connection to the engine, on the front's event loop.

    Messages are handled in the callback in which their bytes arrive, because a task that reads them would cost another
    iteration of the event loop for every step.

    Args:
        on_message: Called with each message. An exception ends the connection.
    """

    def __init__(self, on_message: Callable[[Message], None]) -> None:
        self._on_message = on_message
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, connection: socket.socket) -> None:
        """Take the front's half of the socket pair."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=connection)

    def send(self, message: Message) -> None:
        """Queue a message, which the engine reads between two steps."""
        assert self._transport is not None
        self._transport.write(message.encode())

    async def wait_ended(self) -> None:
        """Wait until the engine is gone. Raises the exception of `on_message`, if there was one."""
        await self._ended

    def close(self) -> None:
        """Close the connection; the engine ends when it notices."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's own class

    def data_received(self, data: bytes) -> None:
        """Handle the messages that are complete."""
        self._buffer += data
        try:
            for message in _take_messages(self._buffer):
                self._on_message(message)
        except Exception as error:
            if not self._ended.done():
                self._ended.set_exception(error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """End `wait_ended`: the engine is gone, or `close` was called."""
        if not self._ended.done():
            self._ended.set_result(None)


def _take_messages(buffer: bytearray) -> Iterator[Message]:
    """Remove the complete messages from the beginning of a buffer and yield them."""
    while len(buffer) >= _HEADER.size:
        kind, link, length = _HEADER.unpack_from(buffer)
        end = _HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(memoryview(buffer)[_HEADER.size : end])
        del buffer[:end]
        yield Message(Kind(kind), link, payload)
