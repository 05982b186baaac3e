"""gRPC's wire form (HTTP/2 frames, RFC 9113) in a few microseconds per message.

A neighbour that is itself a gRPC library costs as much as the service it loads, and on a machine with few cores it is
then the neighbour that is measured. This is the part of HTTP/2 that gRPC needs between two processes of ours: no
header is ever decoded (a port or a stream says what is spoken), no receive window ever closes. Send windows are kept.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

from scalellm.services.common.addresses import split_address

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_INITIAL_WINDOW_SIZE, _DEFAULT_WINDOW, _LARGEST_WINDOW, _MAX_FRAME = 0x4, 65_535, 2**31 - 1, 16_384
_REFILL = 1 << 29
_MESSAGE = struct.Struct(">BI")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field in HPACK's plainest form: not indexed, not compressed."""
    return b"\x00" + b"".join(bytes((len(text),)) + text.encode() for text in (name, value))


_OPENING = _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)) + _frame(
    _WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _DEFAULT_WINDOW)
)
_RESPONSE_HEADERS = b"\x88" + _literal("content-type", "application/grpc")


class Stream:
    """One call. The owner sets `on_message` and `on_end`; both are called from the event loop."""

    __slots__ = ("_connection", "_needs_headers", "_outbox", "_received", "_window", "id", "on_end", "on_message")

    def __init__(self, connection: Connection, number: int, window: int, *, needs_headers: bool) -> None:
        self.id = number
        self.on_message: Callable[[bytes], None] = lambda message: None
        self.on_end: Callable[[], None] = lambda: None
        self._connection = connection
        self._window = window
        self._received = b""
        self._outbox = b""
        self._needs_headers = needs_headers

    @property
    def is_blocked(self) -> bool:
        """True if what was sent waits for the peer to read."""
        return bool(self._outbox) or self._connection.is_paused

    def send(self, message: bytes, *, last: bool = False) -> None:
        """Send one gRPC message; `last` half-closes the call, and needs an open window."""
        connection = self._connection
        if self._needs_headers:
            self._needs_headers = False
            connection.write(_frame(_HEADERS, _END_HEADERS, self.id, _RESPONSE_HEADERS))
        self._outbox += _MESSAGE.pack(0, len(message)) + message
        self.flush()
        if last:
            connection.write(_frame(_DATA, _END_STREAM, self.id, b""))

    def flush(self) -> None:
        """Send what the windows allow."""
        connection = self._connection
        while self._outbox:
            size = min(len(self._outbox), self._window, connection.window, _MAX_FRAME)
            if size <= 0:
                connection.blocked.add(self)
                return
            connection.write(_frame(_DATA, 0, self.id, self._outbox[:size]))
            self._outbox = self._outbox[size:]
            self._window -= size
            connection.window -= size

    def widen(self, size: int) -> None:
        """The peer reads on."""
        self._window += size

    def take(self, data: bytes) -> None:
        """Bytes of messages came."""
        data = self._received + data if self._received else data
        start = 0
        while len(data) - start >= _MESSAGE.size:
            length = _MESSAGE.unpack_from(data, start)[1]
            end = start + _MESSAGE.size + length
            if end > len(data):
                break
            self.on_message(data[start + _MESSAGE.size : end])
            start = end
        self._received = data[start:]


class Connection(asyncio.Protocol):
    """Either end of one connection.

    Args:
        on_call: The server's: told of each call that is opened. None makes this the client's end.
    """

    def __init__(self, on_call: Callable[[Stream], None] | None = None) -> None:
        self.window = _DEFAULT_WINDOW
        self.blocked: set[Stream] = set()
        self.is_paused = False
        self.is_lost = False
        self._on_call = on_call
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._peer_window = _DEFAULT_WINDOW
        self._unseen_preface = 0 if on_call is None else len(PREFACE)
        self._buffer = b""
        self._outbox: list[bytes] = []
        self._consumed = 0
        self._transport: asyncio.Transport

    def call(self, path: str) -> Stream:
        """Open a call (the client's end)."""
        stream = self._streams[self._next_id] = Stream(self, self._next_id, self._peer_window, needs_headers=False)
        self._next_id += 2
        # 0x83 and 0x86 stand for POST and http.
        block = b"\x83\x86" + b"".join(
            _literal(name, value)
            for name, value in (
                (":path", path),
                (":authority", "bench"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            )
        )
        self.write(_frame(_HEADERS, _END_HEADERS, stream.id, block))
        return stream

    def write(self, data: bytes) -> None:
        """Send bytes; those of one turn of the event loop leave together."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if not self.is_lost:
            self._transport.write(b"".join(outbox))

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.write(_OPENING if self._on_call is not None else PREFACE + _OPENING)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        for stream in tuple(self._streams.values()):
            self._end(stream.id)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        start = 0
        if self._unseen_preface:
            if len(data) < self._unseen_preface:
                self._buffer = data
                return
            start, self._unseen_preface = self._unseen_preface, 0
        end = len(data)
        while end - start >= 9:
            size = (data[start] << 16) | (data[start + 1] << 8) | data[start + 2]
            body = start + 9
            if end - body < size:
                break
            kind, flags, stream = data[start + 3], data[start + 4], int.from_bytes(data[start + 5 : body], "big")
            start = body + size
            self._on_frame(kind, flags, stream, data[body:start])
        self._buffer = data[start:]

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _DATA:
            self._on_data(flags, number, payload)
        elif kind == _HEADERS:
            if self._on_call is not None and number not in self._streams:
                stream = Stream(self, number, self._peer_window, needs_headers=True)
                self._streams[number] = stream
                self._on_call(stream)
            if flags & _END_STREAM:
                self._end(number)
        elif kind == _RST_STREAM:
            self._end(number)
        elif kind == _PING and not flags & _ACK:
            self.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            self._on_settings(payload)
        elif kind == _WINDOW_UPDATE:
            self._on_window_update(number, int.from_bytes(payload, "big"))

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        self._consumed += len(payload)
        if self._consumed > _REFILL:
            refill = struct.pack(">I", self._consumed)
            self.write(_frame(_WINDOW_UPDATE, 0, 0, refill))
            # Links live long, and their one stream has taken nearly all of it.
            if len(self._streams) == 1:
                self.write(_frame(_WINDOW_UPDATE, 0, number, refill))
            self._consumed = 0
        stream = self._streams.get(number)
        if stream is not None:
            if payload:
                stream.take(payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload)
            if flags & _END_STREAM and self._on_call is None:
                self._end(number)

    def _on_settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.widen(value - self._peer_window)
                self._peer_window = value
        self.write(_frame(_SETTINGS, _ACK, 0, b""))
        self._unblock()

    def _on_window_update(self, number: int, size: int) -> None:
        if number == 0:
            self.window += size
        elif (stream := self._streams.get(number)) is not None:
            stream.widen(size)
        self._unblock()

    def _unblock(self) -> None:
        blocked, self.blocked = self.blocked, set()
        for stream in blocked:
            stream.flush()

    def _end(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            self.blocked.discard(stream)
            stream.on_end()


async def connect(address: str) -> Connection:
    """Open a connection to host:port."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, *split_address(address))
    return connection


async def listen(on_call: Callable[[Stream], None]) -> str:
    """Serve on a free port of the loopback until the process ends; returns host:port."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(on_call), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    return f"{host}:{port}"
