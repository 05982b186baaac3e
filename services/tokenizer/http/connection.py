"""Bounds on connections: how many there are, and for how long a client may take nothing of what was written to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web
from aiohttp.http import RawRequestMessage

from scalellm.services.common.guarded import drop_tracebacks


@dataclass(slots=True)
class ConnectionLimits:
    """The limits of one listener's connections, and their number.

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
        inner: aiohttp's, which speaks HTTP.
        limits: Limits of all connections together.
    """

    def __init__(self, inner: web.RequestHandler, limits: ConnectionLimits) -> None:
        self._inner = inner
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._is_malformed = False

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
        """The client has gone, or was cut off."""
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
        if self._is_malformed:
            return
        self._inner.data_received(data)
        self._look_for_error()

    def eof_received(self) -> None:
        """No more bytes will come."""
        if self._transport is not None:
            self._inner.eof_received()

    def pause_writing(self) -> None:
        """Note that the client does not take what was written."""
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._stall = loop.call_later(self._limits.write_stall, self._transport.abort)
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """The client has taken what was written."""
        self._end_stall()
        if self._transport is not None:
            self._inner.resume_writing()

    def cut(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _look_for_error(self) -> None:
        """Take note of a request that is no HTTP, which is refused and ends the connection.

        aiohttp does that a few turns of the event loop later. Until then it would make an error of each piece that
        comes, and quote the piece in it. And each error is in a reference cycle with the frames that it passed, which
        would keep all of it until the garbage collector comes by.
        """
        if queue := self._inner._messages:  # aiohttp tells of it in no other way
            message, _ = queue[-1]
            if not isinstance(message, RawRequestMessage):
                self._is_malformed = True
                drop_tracebacks(message.exc)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
