"""Limits of connections: their number, and the time for which a client may read nothing of its answer."""

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
        write_stall: Seconds for which a client may read nothing before its connection is aborted. Until then an answer
            costs the bytes in the socket's buffer, and its tokens.
        open: The open connections.
    """

    max_connections: int
    write_stall: float = 60.0
    open: set[BoundedConnection] = field(default_factory=set)


class BoundedConnection(asyncio.Protocol):
    """Passes all events on to aiohttp's protocol, and aborts the connection if it exceeds a limit.

    Args:
        inner: aiohttp's protocol, which implements HTTP.
        limits: Limits of all connections together.
    """

    def __init__(self, inner: web.RequestHandler, limits: ConnectionLimits) -> None:
        self._inner = inner
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._is_malformed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or abort it if there are too many."""
        stream = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        if len(self._limits.open) >= self._limits.max_connections:
            stream.abort()
            return
        self._transport = stream
        self._limits.open.add(self)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, which was closed or aborted."""
        if self._transport is None:
            return
        self._transport = None
        self._limits.open.discard(self)
        self._end_stall()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass received bytes on, unless the connection has sent something that is not HTTP."""
        if self._transport is None:
            return
        if self._is_malformed:
            return
        self._inner.data_received(data)
        self._look_for_error()

    def eof_received(self) -> None:
        """Pass the end of the client's bytes on."""
        if self._transport is not None:
            self._inner.eof_received()

    def pause_writing(self) -> None:
        """Start the timer that aborts the connection, since the client does not read."""
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._stall = loop.call_later(self._limits.write_stall, self._transport.abort)
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Stop the timer, since the client has read."""
        self._end_stall()
        if self._transport is not None:
            self._inner.resume_writing()

    def cut(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _look_for_error(self) -> None:
        """Detect a request that is not HTTP, after which all further bytes are ignored.

        aiohttp ends the connection a few iterations of the event loop later. Until then it would make an error of each
        received piece, which quotes that piece and is part of a reference cycle with stack frames, so that all of it
        would stay in memory until a garbage collection.
        """
        if queue := self._inner._messages:  # aiohttp has no public interface for that
            message, _ = queue[-1]
            if not isinstance(message, RawRequestMessage):
                self._is_malformed = True
                drop_tracebacks(message.exc)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
