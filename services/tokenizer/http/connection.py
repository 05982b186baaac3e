"""Bounds on connections: how many there are, and for how long a client may take nothing of what was written to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast


@dataclass(slots=True)
class ConnectionLimits:
    """What the connections of one listener may do, and how many there are.

    Attributes:
        max_connections: More are closed at once.
        write_stall: Seconds for which a client may take nothing before its connection is cut off. Until then an answer
            costs the bytes in the socket's buffer, and its tokens.
        open: Connections that stand.
    """

    max_connections: int
    write_stall: float = 60.0
    open: set[BoundedConnection] = field(default_factory=set)


class BoundedConnection(asyncio.Protocol):
    """Passes everything on to the protocol that speaks HTTP, and cuts the connection off where a limit is reached.

    Args:
        inner: The protocol that speaks HTTP.
        limits: Of all connections together.
    """

    def __init__(self, inner: asyncio.Protocol, limits: ConnectionLimits) -> None:
        self._inner = inner
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        stream = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        if len(self._limits.open) >= self._limits.max_connections:
            stream.abort()
            return
        self._transport = stream
        self._limits.open.add(self)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone, or was cut off."""
        if self._transport is None:
            return
        self._transport = None
        self._limits.open.discard(self)
        self._end_stall()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._transport is None:
            return
        # The error of a request that is no HTTP holds the frames that it passed, and they hold it, until the garbage
        # collector comes by. What they were given is emptied, so that nothing that a client sent stays with them.
        view = memoryview(data)
        del data
        self._inner.data_received(view)  # type: ignore[arg-type]
        view.release()

    def eof_received(self) -> bool | None:
        """No more bytes will come."""
        return self._inner.eof_received() if self._transport is not None else None

    def pause_writing(self) -> None:
        """What was written is not taken."""
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._stall = loop.call_later(self._limits.write_stall, self._transport.abort)
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """It was taken."""
        self._end_stall()
        if self._transport is not None:
            self._inner.resume_writing()

    def cut(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
