"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

_SILENCE = 15.0
"""Seconds without an event after which a comment is sent, because proxies close idle connections."""

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would buffer events
}


class EventStream:
    """Writes events as they come. `open` must be called once, and sends the headers.

    Args:
        request: The HTTP request.
        silence: See _SILENCE.
    """

    def __init__(self, request: web.Request, silence: float = _SILENCE) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._silence = silence
        self._written_at = 0.0
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Send the headers."""
        await self.response.prepare(self._request)
        self._written_at = asyncio.get_running_loop().time()
        self._keeper = asyncio.create_task(self._keep_alive())

    async def write(self, events: bytes) -> None:
        """Send one or more events. Returns once the write buffer has room again."""
        self._written_at = asyncio.get_running_loop().time()
        await self.response.write(events)

    async def close(self, last: bytes = b"") -> None:
        """Send the last events and end the stream."""
        self._stop()
        if last:
            await self.response.write(last)
        await self.response.write_eof()

    def abandon(self) -> None:
        """End the stream without an answer, because the client has left."""
        self._stop()

    def _stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):  # the next write raises it
            while True:
                if (wait := self._written_at + self._silence - loop.time()) > 0:
                    await asyncio.sleep(wait)
                else:
                    await self.write(b": keep-alive\n\n")
