"""Messages between the executor's front and its engine process, over a socket pair.

A message is a fixed header (kind, link, length) and a payload: serialised protobuf, never pickle. The front forwards
the payloads of links without looking into them.
"""

from __future__ import annotations

import asyncio
import enum
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = struct.Struct("<BII")
_READ_BYTES = 1 << 18


class Kind(enum.IntEnum):
    """What a message is about. The payload stands behind the dash."""

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
    """Engine: it is alive - GetExecutorInfoResponse. The first one says that the model is loaded."""
    FATAL = 9
    """Engine: it cannot start - one line that says what to do."""
    TRACE = 10
    """Engine: a traced request ended - TracedRequest."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `link` is 0 where it concerns no link."""

    kind: Kind
    link: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        """Header and payload."""
        return _HEADER.pack(self.kind, self.link, len(self.payload)) + self.payload


class EngineChannel:
    """The engine's end: blocking, used between two steps.

    Args:
        connection: The engine's half of the socket pair.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, *messages: Message) -> None:
        """Write messages; waits while the front is busy. EOFError: the front is gone."""
        try:
            self._connection.sendall(b"".join(message.encode() for message in messages))
        except ConnectionError:
            raise EOFError("the front closed the connection") from None

    def receive(self, timeout: float) -> Iterator[Message]:
        """All messages that have arrived; waits up to `timeout` seconds for the first. EOFError: the front is gone."""
        if not self._has_message():
            while self._poll.poll(timeout * 1000):
                try:
                    data = self._connection.recv(_READ_BYTES)
                except ConnectionError:  # it left without reading all that was sent
                    data = b""
                if not data:
                    raise EOFError("the front closed the connection")
                self._buffer += data
                timeout = 0.0
        while self._has_message():
            kind, link, length = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
            del self._buffer[:end]
            yield Message(Kind(kind), link, payload)

    def _has_message(self) -> bool:
        if len(self._buffer) < _HEADER.size:
            return False
        length: int = _HEADER.unpack_from(self._buffer)[2]
        return len(self._buffer) >= _HEADER.size + length


class FrontChannel:
    """The front's end, on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connection: socket.socket) -> FrontChannel:
        """Take the front's half of the socket pair."""
        return cls(*await asyncio.open_connection(sock=connection))

    def send(self, message: Message) -> None:
        """Queue a message; the engine reads between two steps."""
        self._writer.write(message.encode())

    async def receive(self) -> Message:
        """The next message. EOFError: the engine is gone."""
        try:
            kind, link, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            return Message(Kind(kind), link, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError("the engine closed the connection") from None

    def close(self) -> None:
        """Close the connection; the engine ends when it notices."""
        self._writer.close()
