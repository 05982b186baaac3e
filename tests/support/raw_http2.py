"""HTTP/2 frame by frame: what gRPC's own client never sends, and answers that are never read."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

import grpc
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 16_384
DEFAULT_WINDOW = 65_535
CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass
class RawAnswer:
    """Answer on one stream so far."""

    headers: dict[str, str] = field(default_factory=dict)
    """Headers and trailers."""
    data: bytearray = field(default_factory=bytearray)
    reset: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the end of the stream, and at that of the connection."""

    @property
    def code(self) -> grpc.StatusCode | None:
        """The call's status; None without one."""
        return CODES[int(self.headers["grpc-status"])] if "grpc-status" in self.headers else None

    @property
    def details(self) -> str:
        return unquote(self.headers.get("grpc-message", ""))

    @property
    def messages(self) -> list[bytes]:
        """The messages that have come whole."""
        found, place = [], 0
        while place + 5 <= len(self.data):
            end = place + 5 + struct.unpack_from(">I", self.data, place + 1)[0]
            if end > len(self.data):
                break
            found.append(bytes(self.data[place + 5 : end]))
            place = end
        return found


class RawConnection:
    """One connection. Settings and pings of the peer are acknowledged; everything else is the caller's to send.

    Nothing is granted to the peer but the windows of the settings: see `grant`.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self.encoder = Encoder()
        self.answers: dict[int, RawAnswer] = {}
        self.goaway: GoAwayFrame | None = None
        self.num_frames = 0
        """Frames that have come."""
        self.num_pongs = 0
        """Pings of ours that were acknowledged."""
        self.closed = asyncio.Event()
        """Set when the peer has closed the connection."""
        self._reader = reader
        self._writer = writer
        self._address = address
        self._decoder = Decoder()
        self._next_stream = 1
        self._initial_window = DEFAULT_WINDOW
        self._windows = {0: DEFAULT_WINDOW}
        self._granted = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None

    def write(self, *frames: Frame | bytes) -> None:
        """Send frames, or any bytes. After the connection has ended this does nothing."""
        data = b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames)
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    async def drain(self) -> bool:
        """Wait until the peer's machine has taken nearly all of it; false when the connection has ended."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
        return not self._writer.transport.is_closing()

    def headers(self, path: str, metadata: Sequence[tuple[str, str | bytes]] = ()) -> bytes:
        """The header block of a gRPC call."""
        fixed = {":method": "POST", ":scheme": "http", ":path": path, ":authority": self._address, "te": "trailers"}
        return self.encoder.encode([*fixed.items(), ("content-type", "application/grpc"), *metadata])

    def new_stream(self) -> int:
        """The number of a stream that has not been used."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.answers[stream] = RawAnswer()
        self._windows[stream] = self._initial_window
        if self.closed.is_set():
            self.answers[stream].ended.set()
        return stream

    def open(self, path: str, metadata: Sequence[tuple[str, str | bytes]] = ()) -> int:
        """Begin a call of the method with this path, such as `/scalellm.v1.Tokenizer/Encode`; returns its stream."""
        stream = self.new_stream()
        self.write(HeadersFrame(stream, self.headers(path, metadata), flags=["END_HEADERS"]))
        return stream

    async def call(self, path: str, message: bytes, metadata: Sequence[tuple[str, str | bytes]] = ()) -> int:
        """Send a whole call with one message; returns its stream."""
        stream = self.open(path, metadata)
        await self.send(stream, message)
        return stream

    async def send(self, stream: int, message: bytes, *, end: bool = True) -> None:
        """Send a message as fast as the peer's windows allow. Ends early when the stream or the connection does."""
        data = struct.pack(">BI", 0, len(message)) + message
        answer = self.answers[stream]
        while data and not answer.ended.is_set():
            async with self._granted:
                await self._granted.wait_for(
                    lambda: min(self._windows[0], self._windows[stream]) > 0 or answer.ended.is_set()
                )
            size = min(MAX_FRAME_BYTES, self._windows[0], self._windows[stream])
            piece, data = data[:size], data[size:]
            for window in (0, stream):
                self._windows[window] -= len(piece)
            self.write(DataFrame(stream, piece, flags=["END_STREAM"] if end and not data else []))
            await self.drain()

    def grant(self, stream: int, num_bytes: int) -> None:
        """Let the peer send so much more, on a stream and on the connection."""
        self.write(WindowUpdateFrame(stream, num_bytes), WindowUpdateFrame(0, num_bytes))

    async def answer(self, stream: int) -> RawAnswer:
        """Wait for the end of a call."""
        answer = self.answers[stream]
        await answer.ended.wait()
        return answer

    async def round_trip(self) -> bool:
        """Wait until the peer has seen all that was sent; false when it has closed the connection."""
        seen = self.num_pongs
        self.write(PingFrame(0, b"roundtrp"))
        async with self._granted:
            await self._granted.wait_for(lambda: self.num_pongs > seen or self.closed.is_set())
        return not self.closed.is_set()

    def read_on(self) -> None:
        """Take what comes, from now on."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Close the connection as it is."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            while True:
                frame, length = Frame.parse_frame_header(memoryview(await self._reader.readexactly(9)))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
                self.num_frames += 1
                self._take(frame)
                async with self._granted:
                    self._granted.notify_all()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.closed.set()
            for answer in self.answers.values():
                answer.ended.set()
            async with self._granted:
                self._granted.notify_all()

    def _take(self, frame: Frame) -> None:
        answer = self.answers.get(frame.stream_id) or RawAnswer()
        match frame:
            case SettingsFrame() if "ACK" not in frame.flags:
                before = self._initial_window
                self._initial_window = frame.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, before)
                for stream in self.answers:
                    self._windows[stream] += self._initial_window - before
                self.write(SettingsFrame(flags=["ACK"]))
            case PingFrame() if "ACK" not in frame.flags:
                self.write(PingFrame(0, frame.opaque_data, flags=["ACK"]))
            case PingFrame():
                self.num_pongs += 1
            case WindowUpdateFrame():
                if frame.stream_id in self._windows:
                    self._windows[frame.stream_id] += frame.window_increment
            case HeadersFrame():  # gRPC's servers send blocks of one frame
                answer.headers.update((name, value) for name, value in self._decoder.decode(frame.data))
            case DataFrame():
                answer.data += frame.data
            case RstStreamFrame():
                answer.reset = frame.error_code
                answer.ended.set()
            case GoAwayFrame():
                self.goaway = frame
        if "END_STREAM" in frame.flags:
            answer.ended.set()


@asynccontextmanager
async def connect(
    address: str,
    settings: Mapping[int, int] | None = None,
    *,
    is_reading: bool = True,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[RawConnection]:
    """Open a connection and send the preface.

    Args:
        address: Host and port.
        settings: The client's, such as `{SettingsFrame.INITIAL_WINDOW_SIZE: 0}`.
        is_reading: True: read what the peer sends. False: never read; the peer gets no window and no acknowledgement.
        context: For TLS, with "h2" among its ALPN protocols.
    """
    async with bare_connection(address, context) as connection:
        connection.write(PREFACE, SettingsFrame(settings=dict(settings or {})))
        if is_reading:
            connection.read_on()
        yield connection


@asynccontextmanager
async def bare_connection(address: str, context: ssl.SSLContext | None = None) -> AsyncIterator[RawConnection]:
    """Open a connection and send nothing."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    connection = RawConnection(reader, writer, address)
    try:
        yield connection
    finally:
        await connection.close()
