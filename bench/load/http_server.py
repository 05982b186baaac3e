"""The part of an HTTP/1.1 server that an echo of a chat server needs: a body in, pieces out as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its pieces leave one by one, each as soon as it is there."""

    pieces: AsyncIterator[bytes]
    content_type: str = "application/json"
    status: int = 200


class Drop(Exception):  # noqa: N818 - a request to the server, not a failure
    """Raised by a reply's pieces: close the connection where it stands."""


Handler = Callable[[str, bytes], Reply]


async def serve_http(handler: Handler, port: int = 0) -> asyncio.Server:
    """Answer requests (path, body) with the handler's replies, on a port of the loopback interface; 0: a free one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that goes away in the middle ends its connection and nothing else.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, Drop):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await _reply(writer, handler(head[0].split()[1], body))
        writer.transport.abort()

    return await asyncio.start_server(serve, "127.0.0.1", port)


def port_of(server: asyncio.Server) -> int:
    """Return the port of a server."""
    port: int = server.sockets[0].getsockname()[1]
    return port


async def _reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    head = f"HTTP/1.1 {reply.status} .\r\ncontent-type: {reply.content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
    writer.write(head.encode())
    async for piece in reply.pieces:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()
