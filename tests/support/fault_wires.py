"""Connections that can go silent without closing, as when a cable is pulled: neither end is told anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from service_processes import PATIENCE

_CHUNK = 2**16


class Wires:
    """A thread that forwards what goes over the wires; use it as a context manager.

    Args:
        host: Address on which the wires listen.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)

    def __enter__(self) -> Wires:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def add(self, target: str) -> Wire:
        """A wire to host:port or to the Unix socket at a path."""
        wire = Wire(target, self._loop.call_soon_threadsafe)
        opened: Future[None] = asyncio.run_coroutine_threadsafe(wire.open(self._host), self._loop)
        opened.result(PATIENCE)
        return wire

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Wire:
    """Forwards connections to a target.

    While the wire is cut nothing is forwarded, ends of connections included: bytes wait as they wait for a network's
    retransmission. New connections are taken and stay silent, too.

    Args:
        target: host:port, or the path of a Unix socket.
        call: Has a function called in the wires' thread.
    """

    def __init__(self, target: str, call: Callable[..., object]) -> None:
        self.target = target
        self.address = ""
        self._call = call
        self._whole = asyncio.Event()
        self._whole.set()

    def cut(self) -> None:
        """From now on nothing gets through."""
        self._call(self._whole.clear)

    def mend(self) -> None:
        """Let bytes pass again: those that wait, and later ones."""
        self._call(self._whole.set)

    async def open(self, host: str) -> None:
        """Listen on a free port, which `address` then names."""
        server = await asyncio.start_server(self._serve, host, 0)
        self.address = "{}:{}".format(*server.sockets[0].getsockname()[:2])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            theirs = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        pumps = [self._pump(reader, theirs[1]), self._pump(theirs[0], writer)]
        tasks = [asyncio.ensure_future(pump) for pump in pumps]
        try:
            # An end of either side ends the other: what is left to say after that, nobody waits for.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in (writer, theirs[1]):
                end.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.target.startswith("/"):
            return await asyncio.open_unix_connection(self.target)
        host, _, port = self.target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
            await self._whole.wait()
