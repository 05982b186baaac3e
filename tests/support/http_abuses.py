"""Abuses of HTTP/1.1, each bounded in what it sends and how long it waits."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

A_WHILE = 2.0
"""Seconds for which connections are held open."""

CHAT = "/v1/chat/completions"
HELLO = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
LONG = json.dumps({"prompt": "Hi", "max_tokens": 1500, "ignore_eos": True, "stream": True, "n": 4}).encode()

Counts = Counter[str]
Abuse = Callable[[str], Awaitable[Counts]]
"""From an address to counts of what was sent and what came back."""


def post(path: str, body: bytes, *more: str, length: str | None = None) -> bytes:
    """Return a request as it goes over the wire; `length` "" leaves its length out."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *more]
    if length != "":
        lines.append(f"content-length: {length or len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Peer:
    """A raw connection, whose end and whose errors are counts."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def open(self, address: str, receive_buffer: int | None = None) -> bool:
        """Return whether there is a connection."""
        host, port = address.rsplit(":", 1)
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            limit = 2**16 if receive_buffer is None else 1
            self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        except OSError:
            sock.close()
            self._counts["not connected"] += 1
            return False
        return True

    async def send(self, data: bytes, seconds: float = 3.0) -> bool:
        """Return whether all of it was taken."""
        assert self._writer is not None
        try:
            self._writer.write(data)
            async with asyncio.timeout(seconds):
                await self._writer.drain()
        except TimeoutError:
            self._counts["not taken"] += 1
            return False
        except OSError:
            self._counts["closed"] += 1
            return False
        return True

    def end(self) -> None:
        """Send no more."""
        assert self._writer is not None
        with suppress(OSError):
            self._writer.write_eof()

    async def read(self, seconds: float = A_WHILE) -> None:
        """Count the statuses that come until the other end closes or is silent."""
        assert self._reader is not None
        found = b""
        try:
            while True:
                async with asyncio.timeout(seconds):
                    part = await self._reader.read(2**16)
                if not part:
                    break
                found = found[-64:] + part
                for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", found):
                    self._counts[status.decode()] += 1
                found = found[-20:] if found.endswith(b"\n") or len(found) > 20 else found
        except TimeoutError:
            self._counts["silent"] += 1
        except OSError:
            self._counts["reset"] += 1

    def close(self, *, resets: bool = False) -> None:
        """Leave."""
        if self._writer is None:
            return
        if resets:
            self._writer.transport.abort()
        else:
            self._writer.close()


async def _each(number: int, one: Callable[[int, Counts], Awaitable[None]], at_once: int = 200) -> Counts:
    counts, turns = Counts(), asyncio.Semaphore(at_once)

    async def run(index: int) -> None:
        async with turns:
            await one(index, counts)

    await asyncio.gather(*(run(index) for index in range(number)))
    return counts


async def _held(address: str, number: int, pieces: Sequence[bytes], pause: float = 0.1) -> Counts:
    """Connections that send piece after piece, slowly, then stay, then leave."""

    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if not await peer.open(address):
            return
        counts["connected"] += 1
        for piece in pieces:
            if not await peer.send(piece):
                break
            await asyncio.sleep(pause)
        await peer.read()
        peer.close(resets=index % 2 == 0)

    return await _each(number, one, number)


async def slowloris(address: str) -> Counts:
    """Heads that come byte by byte, and never end."""
    return await _held(address, 400, [bytes([byte]) for byte in b"POST /v1/chat/c"])


async def slow_bodies(address: str) -> Counts:
    """Bodies that come byte by byte."""
    return await _held(address, 400, [post(CHAT, b"", length="1000"), *[b" "] * 15])


async def _endless(address: str, beginning: bytes, more: bytes, times: int) -> Counts:
    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if not await peer.open(address):
            return
        if await peer.send(beginning):
            for _ in range(times):
                counts["sent"] += 1
                if not await peer.send(more):
                    break
        await peer.read()
        peer.close()

    return await _each(8, one)


async def endless_headers(address: str) -> Counts:
    """Heads that have header after header."""
    return await _endless(address, b"GET /health HTTP/1.1\r\nhost: x\r\n", b"x-a: b\r\n" * 8000, 200)


async def endless_header(address: str) -> Counts:
    """Heads with one value that never ends."""
    return await _endless(address, b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"a" * 2**16, 200)


async def endless_chunk_extensions(address: str) -> Counts:
    """Chunks whose sizes are followed by extensions that never end."""
    beginning = post(CHAT, b"1;", "transfer-encoding: chunked", length="")
    return await _endless(address, beginning, b"a=b;" * 2**14, 200)


async def many_chunk_extensions(address: str) -> Counts:
    """Chunks of one byte, each with an extension of a kilobyte."""
    beginning = post(CHAT, b"", "transfer-encoding: chunked", length="")
    return await _endless(address, beginning, (b"1;" + b"a" * 1000 + b"\r\n \r\n") * 64, 200)


async def tiny_chunks(address: str) -> Counts:
    """Bodies in chunks of one byte each."""
    beginning = post(CHAT, b"", "transfer-encoding: chunked", length="")
    return await _endless(address, beginning, b"1\r\n \r\n" * 10_000, 100)


async def endless_trailers(address: str) -> Counts:
    """Bodies that are followed by trailer after trailer."""
    beginning = post(CHAT, b"%x\r\n%s\r\n0\r\n" % (len(HELLO), HELLO), "transfer-encoding: chunked", length="")
    return await _endless(address, beginning, b"x-a: b\r\n" * 8000, 200)


async def large_bodies(address: str) -> Counts:
    """Bodies of the largest size that is taken, by many at once, never completed."""
    return await _endless(address, post(CHAT, b'{"a": "', length="3000000"), b"a" * 2**16, 45)


async def many_connections(address: str) -> Counts:
    """5,000 connections that say nothing."""
    return await _held(address, 5000, ())


async def unread_streams(address: str) -> Counts:
    """Streams whose clients take nothing, and leave."""

    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if await peer.open(address, receive_buffer=1024) and await peer.send(post("/v1/completions", LONG)):
            counts["asked"] += 1
            await asyncio.sleep(A_WHILE)
        peer.close(resets=index % 2 == 0)

    return await _each(100, one)


async def pipelined_floods(address: str) -> Counts:
    """Thousands of requests on one connection, sent without waiting for answers, which some do not read."""

    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if not await peer.open(address):
            return
        wave = (post(CHAT, b"{"), b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", post("/tokenize", b'{"prompt": "Hi"}'))[
            index % 3
        ]
        for _ in range(20):
            if not await peer.send(wave * 100):
                break
            counts["sent"] += 100
        if index % 2:
            await peer.read()
        peer.close(resets=index % 2 == 0)

    return await _each(24, one)


async def half_open(address: str) -> Counts:
    """Clients that send a part of a request, or all of it, and no more."""
    whole = post("/v1/completions", LONG)

    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if not await peer.open(address):
            return
        if await peer.send(whole[: index % (2 * len(whole))]):
            peer.end()
        await peer.read(A_WHILE if index % 8 == 0 else 0.05)
        peer.close(resets=index % 2 == 0)

    return await _each(400, one)


async def comers_and_goers(address: str) -> Counts:
    """Connections that are closed at once, and requests whose clients leave at once."""

    async def one(index: int, counts: Counts) -> None:
        peer = Peer(counts)
        if await peer.open(address):
            counts["connected"] += 1
            if index % 2:
                await peer.send(post("/v1/completions", LONG))
        peer.close(resets=index % 3 == 0)

    return await _each(2000, one)


async def odd_heads(address: str) -> Counts:
    """Heads with what no client sends, and bytes at random."""
    rng = random.Random("odd heads")
    odd = (
        *("expect: 100-continue", "expect: nothing", "upgrade: h2c", "upgrade: websocket", "connection: upgrade"),
        *("connection: keep-alive, close", "transfer-encoding: gzip, chunked", "transfer-encoding: identity"),
        *("content-length: 0", "content-length: +5", "content-length: 9" + "9" * 30, "content-encoding: br"),
        *("content-type: application/json; charset=utf-7", "host: \xff", "x-request-id: " + "a" * 4000),
        *(
            "traceparent: 00-" + "f" * 32 + "-" + "f" * 16 + "-01",
            "tracestate: " + "a=b," * 200,
            "cookie: " + "a=b;" * 500,
        ),
        *("request-timeout-ms: 1e400", "x-stainless-read-timeout: 0.001", "origin: null", "authorization: Basic \x7f"),
        *("x: a\tb", "x : a", " x: folded", "x: a\x0bb", "range: bytes=0-", "te: trailers", "x\x00: a"),
    )

    async def one(index: int, counts: Counts) -> None:
        local = random.Random(f"{rng.random()} {index}")
        data = bytearray(post(local.choice((CHAT, "/health", "*", "http://x/health", "/%00", "//")), HELLO))
        head = "\r\n".join(local.choice(odd) for _ in range(local.randint(1, 3))).encode("latin-1")
        data[data.index(b"\r\n\r\n") : data.index(b"\r\n\r\n")] = b"\r\n" + head
        if index % 3 == 0:
            for _ in range(local.randint(1, 4)):
                data[local.randrange(len(data))] = local.randrange(256)
        peer = Peer(counts)
        if await peer.open(address) and await peer.send(bytes(data)):
            await peer.read(1.0)
        peer.close()

    return await _each(1500, one, 150)


ABUSES: dict[str, Abuse] = {
    abuse.__name__.replace("_", " "): abuse
    for abuse in (
        *(slowloris, slow_bodies, endless_headers, endless_header, endless_chunk_extensions, many_chunk_extensions),
        *(tiny_chunks, endless_trailers, large_bodies, many_connections, unread_streams, pipelined_floods, half_open),
        *(comers_and_goers, odd_heads),
    )
}
